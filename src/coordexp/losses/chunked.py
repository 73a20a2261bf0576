"""The fused objective: logits one chunk at a time, closed-form gradient in the forward pass.

Per chunk one matrix product into a reused buffer, one trip through it (:mod:`coordexp.losses.rows`), the slice
in its closed form, and two products for ``dh`` and ``dW``. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from coordexp.losses import terms
from coordexp.losses.diagnostics import coord_diagnostics, row_diagnostics
from coordexp.losses.linear import HeadInputs, HeadResult, combine, term_scales
from coordexp.losses.rows import RestStats, RowInputs, rest_pass
from coordexp.losses.terms import SLICE_TERMS, CoordSlice, SliceOutcome

RowPass = Callable[[Tensor, RowInputs], RestStats]
SlicePass = Callable[[CoordSlice, Mapping[str, Tensor], bool], SliceOutcome]

# A row stride of whole 128-byte lines, where the vocabulary is not a multiple of 8.
_STRIDE: Final = 64

_FLOAT32_IS_FASTER: Final = frozenset({"cpu"})


@dataclass(frozen=True)
class Needs:
    """Which gradients are asked for; ``rest`` whether any needs the logits outside the slice."""

    hidden: bool
    weight: bool
    coord_weight: bool
    bias: bool

    @staticmethod
    def of(x: HeadInputs) -> Needs:
        """From ``requires_grad`` of the inputs; none where gradients are switched off."""
        on = torch.is_grad_enabled()
        extra = [t is not None and on and t.requires_grad for t in (x.coord_weight, x.bias)]
        return Needs(on and x.hidden.requires_grad, on and x.weight.requires_grad, *extra)

    @property
    def any(self) -> bool:
        """Whether a gradient pass is needed at all."""
        return self.hidden or self.weight or self.coord_weight or self.bias

    @property
    def rest(self) -> bool:
        """Whether the gradient over the rest of the vocabulary is used."""
        return self.hidden or self.weight or self.bias


def chunked(x: HeadInputs) -> HeadResult:
    """Plain torch, CPU and GPU."""
    return fused_loss(x, row_pass=rest_pass, slice_pass=slice_pass)


def fused_loss(x: HeadInputs, *, row_pass: RowPass, slice_pass: SlicePass) -> HeadResult:
    """The chunk loop, with the two passes of the device at hand."""
    needs, dtype = Needs.of(x), _product_dtype(x)  # asked before both are switched off
    with torch.no_grad(), torch.autocast(x.hidden.device.type, enabled=False):
        loop = _Loop(x, needs, dtype, row_pass, slice_pass)
        for start in range(0, max(1, x.num_rows), loop.chunk):  # once even for no row: shapes and graph stay
            loop.step(start, min(start + loop.chunk, x.num_rows))
        values = loop.values
        loss = combine(values, loop.scales, x)
        everywhere = row_diagnostics(**loop.rows)
    if needs.any:
        inputs = (x.hidden, x.weight, x.coord_weight, x.bias)
        loss = _Attach.apply(loss, loop.gradients(), *inputs)  # type: ignore[no-untyped-call]
    return HeadResult(loss, values, everywhere, loop.coord)


def _product_dtype(x: HeadInputs) -> torch.dtype:
    """Type of the matrix products: autocast's (which leaves float64 alone), or the inputs' common one; float32 at least where that is
    faster."""
    device = x.hidden.device.type
    common = torch.promote_types(x.hidden.dtype, x.weight.dtype)
    if device in _FLOAT32_IS_FASTER:
        return torch.promote_types(common, torch.float32)
    cast = torch.is_autocast_enabled(device) and common != torch.float64
    return torch.get_autocast_dtype(device) if cast else common


def slice_pass(s: CoordSlice, scales: Mapping[str, Tensor], gradient: bool) -> SliceOutcome:
    """Term values ``[n]``, and the weighted gradient ``[n, K]`` of the slice's own terms if asked for."""
    values = {name: term.value(s) for name, term in SLICE_TERMS.items()}
    values["kl"] = values["soft_ce"] - terms.target_entropy(s.q)
    total = None
    if gradient:
        total = torch.zeros_like(s.logits)
        for name, scale in scales.items():
            if name in SLICE_TERMS:
                total.addcmul_(SLICE_TERMS[name].gradient(s), scale.to(s.logits.dtype))
    return values, total


class _Loop:
    """State of the chunk loop: buffers, per-position results, gradient accumulators."""

    def __init__(self, x: HeadInputs, needs: Needs, dtype: torch.dtype, row_pass: RowPass, slice_pass: SlicePass) -> None:
        self.x, self.needs, self.dtype = x, needs, dtype
        self.row_pass, self.slice_pass = row_pass, slice_pass
        device, (vocabulary, width) = x.hidden.device, x.weight.shape
        self.hidden, self.weight = x.hidden.to(dtype), x.weight.to(dtype)  # cast once, not once a chunk
        self.slice_weight = self.weight[x.columns] if x.coord_weight is None else x.coord_weight.to(dtype)
        stride = -(-vocabulary // _STRIDE) * _STRIDE
        self.chunk = max(1, min(x.num_rows, int(x.budget_mb * 2**20 // (stride * dtype.itemsize))))
        self.buffer = torch.empty(self.chunk, stride, dtype=dtype, device=device)[:, :vocabulary]
        self.scales = term_scales(x.objective, x.normalizer)
        # Gradients are kept near 1 until the end: divided by the counts at once they would underflow in float16.
        self.unit = (x.normalizer.text + x.normalizer.coord).double().clamp_min(1.0)
        self.unit_scales = {name: scale * self.unit for name, scale in self.scales.items()}
        self.plus, self.minus = self._coefficients()
        self.pieces: dict[str, list[Tensor]] = {}
        self.dh = torch.empty_like(self.hidden) if needs.hidden else None
        self.dw = torch.zeros(vocabulary, width, dtype=x.wide, device=device) if needs.weight else None
        self.dc = torch.zeros(x.num_bins, width, dtype=x.wide, device=device) if needs.coord_weight else None
        self.db = torch.zeros(vocabulary, dtype=x.wide, device=device) if needs.bias else None

    def _coefficients(self) -> tuple[Tensor, Tensor]:
        """Per row: what multiplies softmax over everything (plus) and over the rest alone (minus, the text gate)."""
        x = self.x
        zero = torch.zeros((), dtype=torch.float64, device=x.hidden.device)
        gate = self.unit_scales.get("gate", zero) / x.objective.temperature
        text = self.unit_scales.get("text_ce", zero)
        counts = (x.num_coord, x.num_rows - x.num_coord)
        plus = torch.cat([gate.expand(counts[0]), text.expand(counts[1])])
        minus = torch.cat([zero.expand(counts[0]), self.unit_scales.get("text_gate", zero).expand(counts[1])])
        return plus.to(x.wide), minus.to(x.wide)

    def step(self, a: int, b: int) -> None:
        """Values and gradients of rows ``a..b``."""
        x, n = self.x, max(0, min(self.x.num_coord - a, b - a))
        hidden, labels = self.hidden[a:b], x.labels[a:b]
        logits = torch.mm(hidden, self.weight.T, out=self.buffer[: b - a])
        if x.bias is not None:
            logits += x.bias.to(self.dtype)
        z = self._slice_logits(hidden, logits)
        label_logit = logits.gather(1, labels[:, None]).squeeze(1).to(x.wide)
        label_logit[:n] = z[:n].gather(1, labels[:n, None] - x.coord_start).squeeze(1)
        # Out of the way: the row pass sees the rest of the vocabulary alone.
        logits[:, x.columns] = -torch.inf
        s = x.coord_slice(z[:n], slice(a, a + n))
        text_lse = torch.logsumexp(z[n:], dim=-1)
        lse_coord = torch.cat([s.lse, text_lse])
        rest = self.row_pass(
            logits,
            RowInputs(
                num_coord=n, temperature=x.objective.temperature, labels=labels, label_logit=label_logit, lse_coord=lse_coord,
                plus=self.plus[a:b], minus=self.minus[a:b], gradient=self.needs.rest, top5=x.top5,
            ),
        )  # fmt: skip
        lse_coord_1 = torch.cat([s.lse_1, text_lse])
        above = {} if rest.above is None else {"above": rest.above + (z > label_logit[:, None]).sum(-1)}
        self._keep(
            "rows", label_logit=label_logit, max_coord=z.amax(-1), max_rest=rest.maximum, lse_coord=lse_coord_1,
            lse_rest=rest.lse_1, **above,
        )  # fmt: skip
        dz: Tensor | None = z[:0] if self.needs.any else None
        if n or a == 0:
            values, dz = self.slice_pass(s, self.unit_scales, self.needs.any)
            self._keep("terms", gate=terms.gate(s.lse, rest.lse[:n]), **values)
            if x.diagnostics:
                self._keep("coord", **coord_diagnostics(s))
        self._keep(
            "terms",
            text_ce=terms.text_ce(torch.logaddexp(text_lse, rest.lse[n:]), label_logit[n:]),
            text_gate=terms.text_gate(text_lse, rest.lse[n:]),
        )
        if dz is not None:
            self._products(a, b, logits, self._slice_gradient(s, dz, z[n:], text_lse, rest.lse, a, b))

    def _slice_logits(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """``z_C`` ``[c, K]`` in float32 or wider, never from rounded logits."""
        x = self.x
        if self.dtype == x.wide and x.coord_weight is None:
            return logits[:, x.columns].clone()
        if self.dtype == x.wide:
            z = hidden @ self.slice_weight.T
        elif hidden.is_cuda:
            z = torch.mm(hidden, self.slice_weight.T, out_dtype=x.wide)
        else:
            z = hidden.to(x.wide) @ self.slice_weight.to(x.wide).T
        return z if x.bias is None else z + x.bias[x.columns].to(x.wide)

    def _slice_gradient(self, s: CoordSlice, dz: Tensor, text: Tensor, text_lse: Tensor, lse_rest: Tensor, a: int, b: int) -> Tensor:
        """Gradient in the slice logits of all rows ``[c, K]``: the gate and the text terms added to ``dz``."""
        n = s.logits.shape[0]
        plus, minus = self.plus[a:b], self.minus[a:b]
        dz -= (plus[:n] * terms.outside_mass(s.lse, lse_rest[:n]))[:, None] * s.p
        mass = terms.outside_mass(lse_rest[n:], text_lse)
        return torch.cat([dz, ((plus[n:] + minus[n:]) * mass)[:, None] * (text - text_lse[:, None]).exp()])

    def _products(self, a: int, b: int, dlogits: Tensor, dz: Tensor) -> None:
        """``dh`` of the chunk, and its share of ``dW``, ``d coord_weight`` and ``d bias``."""
        x, hidden = self.x, self.hidden[a:b]
        if self.needs.rest:
            dlogits[:, x.columns] = dz.to(self.dtype)
        if self.db is not None:
            self.db += dlogits.sum(dim=0, dtype=x.wide)
        if x.coord_weight is not None:
            if self.needs.rest:
                dlogits[:, x.columns] = 0
            if self.dc is not None:
                self.dc.addmm_(dz.T, hidden.to(x.wide))
        if self.dh is not None:
            dh = torch.mm(dlogits, self.weight, out=self.dh[a:b])
            if x.coord_weight is not None:
                dh.addmm_(dz.to(self.dtype), self.slice_weight)
        if self.dw is not None:
            _accumulate(self.dw, dlogits, hidden)

    def _keep(self, group: str, **values: Tensor) -> None:
        for name, value in values.items():
            self.pieces.setdefault(f"{group}/{name}", []).append(value)

    def _group(self, group: str) -> dict[str, Tensor]:
        return {name.split("/")[1]: torch.cat(parts) for name, parts in self.pieces.items() if name.startswith(f"{group}/")}

    @property
    def values(self) -> dict[str, Tensor]:
        """Term values over all rows."""
        return self._group("terms")

    @property
    def rows(self) -> dict[str, Tensor]:
        """What :func:`row_diagnostics` takes, over all rows."""
        return self._group("rows")

    @property
    def coord(self) -> dict[str, Tensor]:
        """Diagnostics of coordinate rows."""
        return self._group("coord")

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Accumulated gradients in the order of ``_Attach``, and what they are too large by."""
        return self.dh, self.dw, self.dc, self.db, self.unit


def _accumulate(total: Tensor, dlogits: Tensor, hidden: Tensor) -> None:
    """``total += dlogits.T @ hidden`` in float32."""
    if dlogits.dtype == total.dtype:
        total.addmm_(dlogits.T, hidden)
    elif dlogits.is_cuda:
        torch.addmm(total, dlogits.T, hidden, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(dlogits.T.to(total.dtype), hidden.to(total.dtype))


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * factor`` in float32 at least, rounded to ``dtype`` once; in place where that takes no more rounding."""
    factor = factor.to(torch.promote_types(gradient.dtype, torch.float32))
    keeps = gradient.dtype in (dtype, factor.dtype)
    return (gradient.mul_(factor) if keeps else gradient * factor).to(dtype)


class _Attach(torch.autograd.Function):
    """Joins a loss to gradients that are already computed. They serve one backward: it scales them in place."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor | None, ...], *inputs: Tensor | None) -> Tensor:
        """The loss itself."""
        ctx.gradients = gradients
        ctx.dtypes = [None if t is None else t.dtype for t in inputs]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times ``grad_output``, on the device.

        Raises:
            RuntimeError: a second backward through the same loss.
        """
        if ctx.gradients is None:
            raise RuntimeError("the gradient of this loss was already used: run the forward again (retain_graph keeps no copy of it)")
        *gradients, unit = ctx.gradients
        ctx.gradients = None
        # One dimension, not none: a scalar tensor would be rounded to the gradient's type before the product, this one is not.
        factor = (grad_output.double() / unit).reshape(1)
        scaled = [None if g is None else _scaled(g, factor, dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return None, None, *scaled
