"""YAML that other people and programs wrote, as plain values. Dates stay text, and nothing grows beyond what the file holds."""

from __future__ import annotations

from typing import Any, Final

import yaml

# Values of a document with its aliases written out. A thousand times what the largest experiment has; a bomb has a thousand million.
MAX_VALUES: Final = 200_000
_MAX_DEPTH: Final = 100
_TIMESTAMP_TAG: Final = "tag:yaml.org,2002:timestamp"


class PlainLoader(yaml.SafeLoader):
    """YAML without dates: ``question: 2026-11-24`` is text, as JSON would have it."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        """An opening bracket; PyYAML's time is quadratic in their depth."""
        if self.flow_level >= _MAX_DEPTH:
            raise yaml.scanner.ScannerError(None, None, "it is nested too deeply", self.get_mark())  # type: ignore[no-untyped-call]
        super().fetch_flow_collection_start(token)  # type: ignore[no-untyped-call]


PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP_TAG]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, loader: type[PlainLoader] = PlainLoader) -> Any:
    """The value of a YAML document.

    Raises:
        ValueError: no YAML, or a document that expands without end; one line, with the line of the fault where it is known.
    """
    try:
        reader = loader(text)
        try:
            node = reader.get_single_node()  # type: ignore[no-untyped-call]
            if node is None:
                return None
            if _size(node, {}) > MAX_VALUES:
                raise ValueError(f"its aliases stand for more than {MAX_VALUES:,} values: write them out, or use fewer")
            return reader.construct_document(node)  # type: ignore[no-untyped-call]
        finally:
            reader.dispose()  # type: ignore[no-untyped-call]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}: "
        raise ValueError(where + _short(error.problem or error.context)) from None
    except yaml.YAMLError as error:
        raise ValueError(_short(error)) from None
    except ValueError as error:
        raise ValueError(_short(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (LookupError, AttributeError, TypeError, OverflowError) as error:
        # An explicit tag on a value that it does not fit, such as ``!!int ""``: PyYAML has no error of its own for it.
        raise ValueError(f"a value does not fit its tag ({type(error).__name__})") from None


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values of a node with its aliases written out; an alias of what it stands in has no end."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError(f"line {node.start_mark.line + 1}: an alias stands within what it is an alias of")
        return known[id(node)]
    known[id(node)] = 0
    parts = node.value if isinstance(node.value, list) else ()
    total = 1
    for part in parts:
        total += sum(_size(one, known) for one in part) if isinstance(part, tuple) else _size(part, known)
    known[id(node)] = total
    return total


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 200 else text[:197] + "..."
