"""A model whose weights stay in their files: each block reads its own when it runs, each tensor is merged when it is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from coordexp.errors import ConfigError
from coordexp.modeling.load import copy_processor_files, skeleton
from coordexp.modeling.shards import Entry, Shards, as_dtype, beside, open_shards, with_entries, write_shards
from coordexp.vocab.adapters import wrap_adapter
from coordexp.vocab.merging import brings, changes, check_mergeable, layers_of, merge, replaces_only_rows, share_rows

GENERATION: Final = "generation_config.json"


@dataclass(frozen=True)
class _Slot:
    """A parameter of the plain model: its name, where it belongs, the key of its stored value, and what holds its place meanwhile.

    ``borrowed``: it is tied to another parameter and has no stored value of its own.
    """

    name: str
    module: nn.Module
    attribute: str
    key: str
    empty: nn.Parameter
    borrowed: bool

    def given(self) -> Tensor | None:
        """The value that an adapter brought along for the parameter itself, if it did."""
        now = self.module.get_parameter(self.attribute)
        return None if now is self.empty else now.detach()


@dataclass(frozen=True)
class Streamed:
    """``model``: of the folder's class, in its adapter if there is one, its weights not read. ``tied``: embedding and head are one table.

    ``tables``: embedding and head of the plain model, ``made`` its class; ``layers``: see :func:`layers_of`. ``converted``: parameters that
    the class puts together from what is stored; they are copied and cannot be read here.
    """

    model: Any
    shards: Shards
    tied: bool
    slots: tuple[_Slot, ...]
    tables: tuple[nn.Module, nn.Module]
    made: str
    layers: dict[int, Any]
    converted: tuple[str, ...]

    @property
    def rows(self) -> int:
        """Rows of the embedding."""
        return int(next(slot for slot in self.slots if slot.module is self.tables[0]).empty.shape[0])

    @property
    def dtype(self) -> str:
        """Type of the stored embedding."""
        key = next(slot.key for slot in self.slots if slot.module is self.tables[0])
        return str(self.shards.entries[key].dtype).removeprefix("torch.")

    @contextmanager
    def filled(self, slots: list[_Slot], dtype: torch.dtype | None = None) -> Iterator[None]:
        """The parameters are there for the length of the block: copies of the stored or the given ones, at least in float32."""
        before = [slot.module.get_parameter(slot.attribute) for slot in slots]
        for slot in slots:
            self._fill(slot, dtype)
        try:
            yield
        finally:
            for slot, parameter in zip(slots, before, strict=True):
                setattr(slot.module, slot.attribute, parameter)

    def _fill(self, slot: _Slot, dtype: torch.dtype | None = None) -> None:
        given = slot.given()
        value = self.shards.read(slot.key) if given is None else given
        value = value.to(dtype or torch.promote_types(value.dtype, torch.float32), copy=True)
        setattr(slot.module, slot.attribute, nn.Parameter(value, requires_grad=False))

    def _empty_below(self, root: nn.Module) -> list[_Slot]:
        inside = {id(module) for module in root.modules()}
        return [slot for slot in self.slots if id(slot.module) in inside and slot.given() is None]

    def start(self) -> None:
        """Make the model callable, in float32. Decoder layers, vision blocks and tables are filled while they run, the rest for good.

        Raises:
            ConfigError: a parameter that is stored in another form.
        """
        if self.converted:
            raise ConfigError(
                f"{self.shards.folder}: {self.converted[0]} is stored in another form than {self.made} holds it, logits cannot be compared "
                "layer by layer: leave --verify out"
            )
        units = list(_units(self.model, {id(self.model.get_input_embeddings()), id(self.model.get_output_embeddings())}))
        for unit in units:
            _fill_while_running(self, unit)
        later = {id(slot) for unit in units for slot in self._empty_below(unit)}
        for slot in self._empty_below(self.model):
            if id(slot) not in later:
                self._fill(slot)
        self.model.eval()

    def merged(self, *, dtype: torch.dtype | None = None, untie: bool = False) -> tuple[Shards, bool]:
        """What is to be written, the adapter merged in and floats in ``dtype`` (None: as stored); and whether the head stays tied.

        A head that is no longer the embedding, by ``untie`` or since the adapter changed one of the two alone, gets an entry
        of its own.
        """
        shards = self.shards if dtype is None else as_dtype(self.shards, dtype)
        entries = shards.entries
        shards = with_entries(shards, {slot.key: self._entry(slot, entries[slot.key]) for slot in self.slots if not slot.borrowed})
        one, other = (self.layers.get(id(table)) for table in self.tables)
        tied = self.tied and not untie and share_rows(one, other)
        for slot in self.slots:
            if slot.borrowed and not tied:
                old = entries[slot.key]
                own = Entry(slot.name, old.dtype, old.shape, partial(self._stored, slot.key, old.dtype))
                shards = beside(shards, slot.key, self._entry(slot, own))
        return shards, tied

    def _stored(self, key: str, dtype: torch.dtype) -> Tensor:
        return self.shards.read(key).to(dtype)

    def _entry(self, slot: _Slot, entry: Entry) -> Entry:
        """``entry`` with what the adapter makes of the parameter."""
        layer, given = self.layers.get(id(slot.module)), slot.given()
        if layer is not None and changes(layer, slot.attribute):
            given = brings(layer, slot.module, slot.attribute)
        elif given is None:
            return entry
        if given is not None:
            value = given
            return Entry(entry.key, entry.dtype, entry.shape, lambda: value.to(entry.dtype))

        def make() -> Tensor:
            own = [other for other in self.slots if other.module is slot.module]
            with torch.no_grad(), self.filled(own, entry.dtype if replaces_only_rows(layer) else None):
                return merge(layer, slot.module, slot.attribute).to(entry.dtype)

        return Entry(entry.key, entry.dtype, entry.shape, make)

    def table_keys(self, tied: bool) -> list[str]:
        """Keys under which embedding and head are written."""
        slots = [slot for slot in self.slots if slot.module in self.tables]
        return [slot.name if slot.borrowed else slot.key for slot in slots if not (tied and slot.borrowed)]


def _units(module: nn.Module, tables: set[int]) -> Iterator[nn.Module]:
    """The elements of every outermost list of layers, and the tables."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif id(child) in tables:
            yield child
        else:
            yield from _units(child, tables)


def _fill_while_running(streamed: Streamed, unit: nn.Module) -> None:
    running: list[Any] = []

    def fill(module: nn.Module, _inputs: Any) -> None:
        running.append(streamed.filled(streamed._empty_below(module)))
        running[-1].__enter__()

    def empty(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        running.pop().__exit__(None, None, None)

    unit.register_forward_pre_hook(fill)
    unit.register_forward_hook(empty, always_call=True)


def open_model(folder: Path, adapter: Path | None = None, *, text_only: bool = False) -> Streamed:
    """The model of ``folder``, in the adapter of that folder if one is given. Only headers and the adapter are read.

    Raises:
        ConfigError: weights that are missing, damaged, quantised, or not those of the folder's class; an adapter that does not fit,
            or that cannot be merged module by module.
    """
    shards = open_shards(folder)
    model = skeleton(folder, text_only=text_only)
    keys, converted = _stored_keys(model, shards)
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    if tables[0].weight is tables[1].weight and not _is_one_table(model, shards, keys):
        untie(model)
    tied = tables[0].weight is tables[1].weight
    slots, made = tuple(_slots(model, shards, keys, converted)), type(model).__name__
    strange = {name: id(model.get_submodule(name.rpartition(".")[0])) for name in sorted(converted)}
    layers: dict[int, Any] = {}
    if adapter is not None:
        check_mergeable(adapter)
        model = wrap_adapter(model, adapter, empty=True)
        layers = layers_of(model, str(adapter))
        lost = next((name for name, module in strange.items() if module in layers), None)
        if lost is not None:
            raise ConfigError(f"{adapter}: {lost} is adapted, and stored in another form than {made} has it: merge it with PEFT first")
        if tied:
            _give_to_both(slots, tables)
    return Streamed(model, shards, tied, slots, tables, made, layers, tuple(strange))


def save_streamed(
    model: Streamed, shards: Shards, out: Path, *, tied: bool, tokenizer: Any, processor_from: Path, dtype: str | None = None,
    text_only: bool = False, step: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Write weights, configuration (``dtype`` in it, None: as it is), tokenizer and processor files to ``out``, and look at them again.

    ``step`` is called after each file of weights.

    Raises:
        ConfigError: no room on the disk, or the written headers are not those of the written configuration.
    """
    out.mkdir(parents=True, exist_ok=True)
    config = model.model.config
    if tied != model.tied:
        set_tied(config, tied)
    config.architectures, config.dtype = [model.made], dtype or config.dtype or model.dtype
    config.save_pretrained(out)
    if (shards.folder / GENERATION).is_file():
        shutil.copyfile(shards.folder / GENERATION, out / GENERATION)
    write_shards(shards, out, step)
    tokenizer.save_pretrained(out)
    copy_processor_files(processor_from, out)
    if open_model(out, text_only=text_only).tied != tied:
        raise ConfigError(f"{out}: expected a {'tied' if tied else 'separate'} head in what was written, found the other")


def untie(model: Any) -> None:
    """Give the head of a model on the meta device a table of its own; the configuration says so too."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(torch.empty_like(head.weight), requires_grad=False)
    set_tied(model.config, False)
    model.all_tied_weights_keys = {}


def set_tied(config: Any, tied: bool) -> None:
    """Write it wherever the configuration is asked for it."""
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = tied


def _stored_keys(model: Any, shards: Shards) -> tuple[dict[str, str], set[str]]:
    """Key of every parameter and buffer that is stored as the model holds it, by its name there, renamed as ``from_pretrained`` does;
    and the names of those that it would put together from what is stored, such as experts."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    wanted, prefix = model.state_dict(), model.base_model_prefix
    found, put_together = {}, set()
    for key in sorted(shards.entries, key=dot_natural_key):
        name, converted = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, converted = rename_source_key(key, [], [], prefix, wanted)
        if converted is not None:
            put_together.add(name)
        elif name in wanted:
            found[name] = key
    return found, put_together


def _is_one_table(model: Any, shards: Shards, keys: dict[str, str]) -> bool:
    """False where the configuration ties head and embedding and two tables are stored that differ: they are loaded as two."""
    names = [f"{_name_of(model, table)}.weight" for table in (model.get_input_embeddings(), model.get_output_embeddings())]
    if any(name not in keys for name in names):
        return True
    one, other = (shards.read(keys[name]) for name in names)
    return torch.equal(one, other)


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _slots(model: Any, shards: Shards, keys: dict[str, str], converted: set[str]) -> Iterator[_Slot]:
    """A slot for every parameter but the ``converted`` ones; buffers that are stored are read at once.

    Raises:
        ConfigError: a parameter that no file holds, or another shape than the configuration asks for.
    """
    entries = shards.entries
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = {id(parameter): keys[name] for name, parameter in parameters.items() if name in keys}
    places = {id(parameter): _placeholder(parameter) for parameter in parameters.values()}
    for name, parameter in parameters.items():
        if name in converted:
            continue
        path, _, attribute = name.rpartition(".")
        key = keys.get(name) or tied.get(id(parameter))
        if key is None:
            raise ConfigError(f"{shards.folder}: no file holds {name} as {type(model).__name__} needs it: copy the whole checkpoint again")
        if entries[key].shape != tuple(parameter.shape):
            raise ConfigError(
                f"{shards.folder}: {key} is {list(entries[key].shape)}, config.json asks for {list(parameter.shape)}: "
                "files of two models are mixed here"
            )
        slot = _Slot(name, model.get_submodule(path), attribute, key, places[id(parameter)], borrowed=name not in keys)
        setattr(slot.module, attribute, slot.empty)
        yield slot
    for name, buffer in model.named_buffers():
        if name in keys:
            buffer.copy_(shards.read(keys[name]))


def _placeholder(parameter: nn.Parameter) -> nn.Parameter:
    """Of that shape, without memory. It is NaN: a layer that ran without its weights would show. Not on the meta device, or else PEFT
    would move the adapter there too."""
    return nn.Parameter(torch.tensor(torch.nan).expand(parameter.shape), requires_grad=False)


def _give_to_both(slots: tuple[_Slot, ...], tables: tuple[nn.Module, nn.Module]) -> None:
    """A whole table that an adapter brought for one of two tied modules is the other's too."""
    given = next((slot.module.get_parameter(slot.attribute) for slot in slots if slot.module in tables and slot.given() is not None), None)
    if given is not None:
        for table in tables:
            table.weight = given
