"""One training step of an SAE at the hardware's speed: only the selection is dense, the rest is sparse.

Reads and writes nothing. Losses and gradients are those of `builders.sae_losses`; the code of a batch is kept
as a CSR matrix, pre-activations live in one buffer of a few megabytes, gradients in buffers that are reused.
On a GPU the sparse products are `builders.sae_kernels`, and TopK and BatchTopK never wait for the device (of
several processes BatchTopK does; ReLU and JumpReLU must know how many atoms are active).
"""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from builders.recipe import SaeConfig
from builders.sae_losses import aux_loss, loss_of, residual_unit
from daco.kernels import kernels_of

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

PRE_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
"""Pre-activations held at once: what stays in the cache of a CPU, a share of the memory of a GPU."""
DENSE_SHARE = 0.05
"""Above this share of active atoms dense matrix products are faster than sparse ones (ReLU, early on)."""
NARROW = 2**18
"""Encoders of fewer weights are multiplied in float32 whatever the hardware offers."""


class Code(NamedTuple):
    """The active atoms of a batch, a CSR matrix [batch, m]."""

    values: Tensor
    """[n], their pre-activations as the decoder takes them, in float32."""
    atoms: Tensor
    """[n], which atom each value is of, token by token."""
    starts: Tensor
    """[batch + 1], where each token's values start."""


def quickest(device: torch.device, n_weights: int) -> str:
    """dtype in which atoms are *selected*; the values of the selected are always computed in float32.

    A GPU and a CPU with AMX multiply bfloat16 faster, a CPU with VNNI int8, others float32.
    """
    if n_weights < NARROW:
        return "float32"
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return "bfloat16"
    if device.type == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return "bfloat16"
    if device.type == "cpu" and getattr(torch.cpu, "_is_vnni_supported", bool)():
        return "int8"
    return "float32"


def kernels_for(x: Tensor) -> Any:
    """The kernels that take the place of torch's sparse products where x lies; None: torch's."""
    if x.device.type != "cuda":
        return None
    return kernels_of("builders.sae_kernels", "training goes on")


def k_largest(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of every row and where they are, in no order; exact.

    The k largest lie in the k groups with the largest maxima, so only those are looked through.
    """
    n, m = pre.shape
    kernels = kernels_for(pre)
    parts = _parts(m, k, pre.device.type, kernels)
    if not parts:
        return pre.topk(k, dim=1, sorted=False)
    chosen = kernels.k_largest if kernels else partial(torch.topk, dim=1, sorted=False)
    if parts == 1:
        return chosen(pre, k)
    grouped = pre.view(n, parts, m // parts)
    groups = chosen(grouped.amax(1), k)[1]
    candidates = grouped.gather(2, groups[:, None].expand(n, parts, k)).view(n, parts * k)
    values, place = chosen(candidates, k)
    return values, place // k * (m // parts) + groups.gather(1, place % k)


def _parts(m: int, k: int, device: str, kernels: Any) -> int:
    """Into how many parts a row is cut, each with one of every group; 0: torch looks through all of it.

    By kernels, which must hold all maxima, then all candidates: the number that makes most of them the least.
    """
    if not kernels:
        return next((p for p in (16, 8) if device == "cpu" and m % p == 0 and m // p >= 4 * k), 0)
    sizes = {p: max(m // p, p * k) for p in (1, 2, 4, 8, 16, 32, 64) if m % p == 0 and m // p >= k}
    parts = min(sizes, key=lambda p: sizes[p], default=0)
    return parts if parts and sizes[parts] <= kernels.WIDEST else 0


class Encoder:
    """Pre-activations of a batch, some tokens at a time, in a buffer that is reused.

    Args:
        W_enc: [m, d], rows are atoms.
        b_enc: [m].
        dtype: `float32`, `bfloat16` or `int8`, of the product.
    """

    def __init__(self, W_enc: Tensor, b_enc: Tensor, dtype: str = "float32") -> None:
        self.W_enc, self.b_enc, self.dtype = W_enc, b_enc, dtype
        m = len(W_enc)
        self.tokens = max(1, PRE_ELEMENTS[W_enc.device.type] // m)
        self.halves = dtype == "bfloat16" and kernels_for(W_enc) is not None
        pre = torch.bfloat16 if self.halves else torch.float32  # kernels choose by either
        self.pre = torch.empty(self.tokens, m, device=W_enc.device, dtype=pre)
        if dtype == "int8":
            self.small = torch.empty_like(W_enc, dtype=torch.int8)
            self.sums = torch.empty(self.tokens, m, dtype=torch.int32, device=W_enc.device)
            self.unit = torch.empty(m, device=W_enc.device)
        elif dtype == "bfloat16":
            self.small = torch.empty_like(W_enc, dtype=torch.bfloat16)

    def refresh(self) -> None:
        """Take over the weights as they stand; call it once a step."""
        if self.dtype == "bfloat16":
            self.small.copy_(self.W_enc)
        elif self.dtype == "int8":
            for rows, small, unit in zip(
                *(t.split(512) for t in (self.W_enc, self.small, self.unit)), strict=True
            ):
                torch.amax(rows.abs(), 1, out=unit).div_(127).clamp_min_(1e-30)
                small.copy_((rows / unit[:, None]).round_())

    def __call__(self, centred: Tensor) -> Tensor:
        """Pre-activations [n <= self.tokens, m] of centred activations [n, d]; good until the next call."""
        pre = self.pre[: len(centred)]
        if self.dtype == "float32":
            return torch.addmm(self.b_enc, centred, self.W_enc.T, out=pre)
        if self.halves:
            return torch.addmm(self.b_enc.bfloat16(), centred.bfloat16(), self.small.T, out=pre)
        if self.dtype == "bfloat16":
            return torch.add(centred.bfloat16() @ self.small.T, self.b_enc, out=pre)
        unit = centred.abs().amax(1, keepdim=True).div_(127).clamp_min_(1e-30)
        small = (centred / unit).round_().to(torch.int8)
        pre.copy_(torch._int_mm(small, self.small.T, out=self.sums[: len(centred)])).mul_(self.unit)
        return torch.addcmul(self.b_enc, pre, unit, out=pre)


def top_k_code(centred: Tensor, encoder: Encoder, k: int) -> Code:
    """The k largest of every token; values not above zero become zero and stay in the list."""
    found = [k_largest(encoder(part), k) for part in centred.split(encoder.tokens)]
    values, atoms = (torch.cat(part).flatten() for part in zip(*found, strict=True))
    starts = torch.arange(0, len(atoms) + 1, k, device=atoms.device)
    return rescored(Code(values, atoms, starts), centred, encoder)


def rescored(code: Code, centred: Tensor, encoder: Encoder) -> Code:
    """The same atoms with their exact values; after a float32 product they are exact already."""
    if encoder.dtype != "float32":
        values = row_products(code, centred, encoder.W_enc) + encoder.b_enc[code.atoms]
        code = code._replace(values=values)
    return code._replace(values=code.values.relu_())


def code_above(centred: Tensor, encoder: Encoder, floor: Tensor | float) -> Code:
    """All atoms whose pre-activation is above a floor, one number or one an atom."""
    values, atoms, counts = [], [], []
    for part in centred.split(encoder.tokens):
        pre = encoder(part)
        above = pre > floor
        values.append(pre[above])
        atoms.append(above.nonzero()[:, 1])
        counts.append(above.sum(1))
    return Code(torch.cat(values), torch.cat(atoms), _starts(torch.cat(counts)))


def batch_top_k_code(centred: Tensor, encoder: Encoder, k: int, guess: float, together: bool = False) -> Code:
    """The `k * batch` largest above zero of a batch.

    Args:
        centred: [batch, d].
        encoder: Its encoder.
        k: Atoms a token, on average.
        guess: A value that at least so many are likely above; a poor guess costs time, nothing else.
        together: The batch is this one and those of the other processes of a torchrun, equally large.
    """
    if together or centred.device.type != "cpu":
        return rescored(largest(centred, encoder, k, together), centred, encoder)
    wanted = k * len(centred)
    code = code_above(centred, encoder, max(guess, 0.0))
    if len(code.values) < wanted and guess > 0:
        code = code_above(centred, encoder, 0.0)
    if len(code.values) > wanted:
        kept = code.values.topk(wanted, sorted=False).indices.sort().values
        token = torch.searchsorted(code.starts, kept, right=True) - 1
        counts = torch.bincount(token, minlength=len(centred))
        code = Code(code.values[kept], code.atoms[kept], _starts(counts))
    return rescored(code, centred, encoder)


def largest(centred: Tensor, encoder: Encoder, k: int, together: bool = False) -> Code:
    """The `k * batch` largest of a batch, or of those of all processes together.

    Of one process, it has always so many entries, so that nothing waits for a GPU to count them. Of several,
    all that equal the last one stay, too: of bfloat16 pre-activations a few per cent more.
    """
    m, first = len(encoder.W_enc), 0
    wanted = k * len(centred) * (dist.get_world_size() if together else 1)
    values = centred.new_empty(0)
    places = torch.empty(0, dtype=torch.int64, device=centred.device)  # token * m + atom
    for part in centred.split(encoder.tokens):
        found, where = (pre := encoder(part).flatten()).topk(min(wanted, len(pre)), sorted=False)
        values, places = torch.cat([values, found]), torch.cat([places, where + first * m])
        if len(values) > wanted:
            values, kept = values.topk(wanted, sorted=False)
            places = places[kept]
        first += len(part)
    if together:
        above = values >= _bar(values, wanted)
        values, places = values[above], places[above]
    places, order = places.sort()
    ends = torch.arange(len(centred) + 1, device=places.device) * m
    return Code(values[order], places % m, torch.searchsorted(places, ends))


def _bar(values: Tensor, wanted: int) -> Tensor:
    """The smallest of the `wanted` largest values of all processes, each of which has as many."""
    everywhere = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, values)
    return torch.cat(everywhere).topk(wanted, sorted=False).values.amin()


def _starts(counts: Tensor) -> Tensor:
    return F.pad(counts.cumsum(0), (1, 0))


def csr(code: Code, values: Tensor, m: int) -> Tensor:
    """The code as torch's CSR matrix [batch, m], with these values."""
    size = (len(code.starts) - 1, m)
    return torch.sparse_csr_tensor(code.starts, code.atoms, values, size, check_invariants=False)


def row_products(code: Code, x: Tensor, rows: Tensor) -> Tensor:
    """`x[token] . rows[atom]` for every active atom, [n]."""
    if kernels := kernels_for(x):
        return kernels.row_products(code.atoms, code.starts, x, rows)
    pattern = csr(code, torch.zeros_like(code.values), len(rows))
    return torch.sparse.sampled_addmm(pattern, x, rows.T, beta=0.0).values()


def decoded(code: Code, W_dec: Tensor) -> Tensor:
    """`c W_dec`, [batch, d]."""
    if kernels := kernels_for(W_dec):
        out = torch.empty(len(code.starts) - 1, W_dec.shape[1], device=W_dec.device)
        return kernels.weighted_sums(code.values, code.atoms, code.starts, W_dec, out)
    return F.embedding_bag(code.atoms, W_dec, code.starts[:-1], per_sample_weights=code.values, mode="sum")


class Transposed(NamedTuple):
    """The code turned round: for every atom the tokens it is active at."""

    order: Tensor
    """[n], from the code's entries to those here."""
    tokens: Tensor
    """[n], tokens, atom by atom."""
    starts: Tensor
    """[m + 1], where each atom's tokens start."""

    def product(self, values: Tensor, x: Tensor, out: Tensor) -> Tensor:
        """`values^T x` into out [m, d]: every row the sum of the tokens it is active at."""
        shape, values = (len(out), len(x)), values[self.order]
        if kernels := kernels_for(x):
            return kernels.weighted_sums(values, self.tokens, self.starts, x, out)
        if x.device.type == "cpu" and not torch.backends.mkl.is_available():
            summed = F.embedding_bag(self.tokens, x, self.starts[:-1], per_sample_weights=values, mode="sum")
            return out.copy_(summed)
        matrix = torch.sparse_csr_tensor(self.starts, self.tokens, values, shape, check_invariants=False)
        return torch.addmm(out, matrix, x, beta=0, out=out)


def transposed(code: Code, m: int) -> Transposed:
    """See `Transposed`."""
    atoms, order = code.atoms.int().sort(stable=True)  # half as many digits for a GPU to sort by
    tokens = torch.repeat_interleave(code.starts.diff(), output_size=len(code.atoms))
    # torch.bincount would count faster, and wait for a GPU
    starts = torch.searchsorted(atoms, torch.arange(m + 1, dtype=atoms.dtype, device=atoms.device))
    return Transposed(order, tokens[order], starts)


class Gradients(NamedTuple):
    """What a step learns: loss and gradients, these in buffers that the next call overwrites."""

    loss: Tensor
    """Scalar, as `builders.sae_losses.loss_of` (with AuxK's share)."""
    by_name: dict[str, Tensor]
    """One a parameter, of its shape."""
    code: Code
    """The code of the batch."""


class Step:
    """Loss and gradients of batches, for one set of weights that an optimiser changes in place.

    Args:
        weights: W_enc [m, d] (rows are atoms), b_enc [m], W_dec [m, d], b_dec [d]; JumpReLU: log_threshold
            [m].
        config: The recipe's section.
        dtype: Of the selection, and of what `read` gives; see `quickest`, which is asked where it is empty.
    """

    def __init__(self, weights: Mapping[str, Tensor], config: SaeConfig, dtype: str = "") -> None:
        self.weights = {name: w.detach() for name, w in weights.items()}
        self.config = config
        self.gradients = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        W_enc = self.weights["W_enc"]
        exact = config.activation in ("relu", "jumprelu")  # what is near the threshold would be misjudged
        dtype = "float32" if exact else dtype or quickest(W_enc.device, W_enc.numel())
        self.encoder = Encoder(W_enc, self.weights["b_enc"], dtype)

    def read(self, rows: Tensor) -> Tensor:
        """What kernels read many times over in sparse products: half as wide where products may be bfloat16.

        Only what is read is rounded; sums, weights, gradients and the code stay float32.
        """
        return rows.bfloat16() if self.encoder.halves else rows

    def __call__(
        self, x: Tensor, penalty: float, guess: float = 0.0, dead: Tensor | None = None
    ) -> Gradients:
        """Loss and gradients of a batch.

        Args:
            x: [batch, d], scaled.
            penalty: lambda at this step.
            guess: For BatchTopK; see `batch_top_k_code`.
            dead: Numbers of dead atoms, for AuxK.
        """
        w, c = self.weights, self.config
        self.encoder.refresh()
        centred = x - w["b_dec"]
        code = self.code(centred, guess)
        live = self._live(code)
        if c.activation in ("relu", "jumprelu") and len(code.values) > DENSE_SHARE * len(x) * len(w["b_enc"]):
            loss, error = self._dense(x, centred, penalty, live)
        else:
            W_dec = self.read(w["W_dec"])
            error = decoded(live, W_dec).sub_(centred)  # b_dec cancels
            loss = error.square().sum() / len(x) + self._backward(centred, error, code, W_dec, penalty)
        if dead is not None and len(dead):
            loss = loss + self._aux(-error, centred, dead)
        return Gradients(loss, self.gradients, live)

    def code(self, centred: Tensor, guess: float = 0.0) -> Code:
        """Active atoms of centred activations; for JumpReLU also those just below their threshold."""
        c = self.config
        if c.activation == "topk":
            return top_k_code(centred, self.encoder, c.k)
        if c.activation == "batchtopk":
            return batch_top_k_code(centred, self.encoder, c.k, guess, dist.is_initialized())
        if c.activation == "relu":
            return code_above(centred, self.encoder, 0.0)
        return code_above(centred, self.encoder, self.weights["log_threshold"].exp() - c.bandwidth / 2)

    def _live(self, code: Code) -> Code:
        """The code as it is decoded: JumpReLU's entries at or below their threshold are zero."""
        if self.config.activation != "jumprelu":
            return code
        above = code.values > self.weights["log_threshold"].exp()[code.atoms]
        return code._replace(values=code.values * above)

    def _backward(
        self, centred: Tensor, error: Tensor, code: Code, W_dec: Tensor, penalty: float
    ) -> Tensor | float:
        """Fill the gradients of reconstruction and penalty; returns the penalty's part of the loss."""
        w, g, batch = self.weights, self.gradients, len(centred)
        live = self._live(code)
        slope = error.mul(2 / batch)
        pulled = row_products(code, slope, W_dec)  # of every value
        priced: Tensor | float = 0.0
        turned = transposed(code, len(w["b_enc"]))
        turned.product(live.values, self.read(slope), g["W_dec"])
        if self.config.activation == "relu" and penalty:
            priced = self._l1(code, pulled, penalty / batch)
        if self.config.activation == "jumprelu":
            priced = self._jump(code, pulled, penalty / batch)
        pulled = pulled * (live.values > 0)
        turned.product(pulled, self.read(centred), g["W_enc"])
        g["b_enc"].zero_().index_add_(0, code.atoms, pulled)
        torch.sub(slope.sum(0), g["b_enc"] @ w["W_enc"], out=g["b_dec"])
        return priced

    def _l1(self, code: Code, pulled: Tensor, price: float) -> Tensor:
        """Add the slopes of `price * sum c_i ||W_dec[i]||`; returns it."""
        W_dec = self.weights["W_dec"]
        norms = W_dec.norm(dim=1)
        active = torch.zeros_like(norms).index_add_(0, code.atoms, code.values)
        self.gradients["W_dec"].addcmul_(W_dec, (price * active / norms)[:, None])
        pulled += price * norms[code.atoms]
        return price * (active @ norms)

    def _jump(self, code: Code, pulled: Tensor, price: float) -> Tensor:
        """Fill the gradient of log_threshold; returns `price` times the number of active atoms."""
        threshold, width = self.weights["log_threshold"].exp(), self.config.bandwidth
        own = threshold[code.atoms]
        near = ((code.values - own).abs() < width / 2) / width
        slope = -near * (own * pulled + price) * own  # the last factor: of the logarithm
        self.gradients["log_threshold"].zero_().index_add_(0, code.atoms, slope)
        return price * (code.values > own).sum()

    def _aux(self, residual: Tensor, centred: Tensor, dead: Tensor) -> Tensor:
        """Add AuxK's gradients of the dead atoms' rows; returns its part of the loss."""
        names = ("W_enc", "b_enc", "W_dec")
        rows = {name: self.weights[name][dead].requires_grad_() for name in names}
        weight = self.config.aux_weight * residual_unit(residual, centred)
        with torch.enable_grad():
            loss = weight * aux_loss(residual, centred, rows, self.config.aux_k)
        slopes = torch.autograd.grad(loss, [rows[name] for name in names])
        for name, slope in zip(names, slopes, strict=True):
            self.gradients[name].index_add_(0, dead, slope)
        return loss.detach()

    def _dense(self, x: Tensor, centred: Tensor, penalty: float, live: Code) -> tuple[Tensor, Tensor]:
        """The same by autograd, where so many atoms are active that nothing is sparse; loss and error."""
        leaves = {name: w.clone().requires_grad_() for name, w in self.weights.items()}
        with torch.enable_grad():
            loss = loss_of(x, leaves | {"W_enc": leaves["W_enc"].T}, self.config, penalty)
        for name, slope in zip(leaves, torch.autograd.grad(loss, [*leaves.values()]), strict=True):
            self.gradients[name].copy_(slope)
        code = csr(live, live.values, len(self.weights["b_enc"])).to_dense()
        return loss.detach(), code @ self.weights["W_dec"] - centred
