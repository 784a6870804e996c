"""One trainer of SAEs in an environment of its own, driven by `sae_training.py` through its standard input.

Usage: python sae_contender.py NAME FOLDER. FOLDER holds shape.json, tokens.f32 (scaled activations) and
start.safetensors. Each line read, "step FIRST N" (N batches from token FIRST on) or "fve", is answered by a
line of JSON. Every trainer starts from the same weights and gets the same batches; its own step is called, or
written out as its trainer has it.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

Contender = tuple[Callable[[Any], Any], Callable[[Any], Any]]
"""One training step on a batch, and the reconstruction of a batch."""


def daco(shape: dict[str, Any], start: dict[str, Any], select: str) -> Contender:
    from builders.recipe import SaeConfig
    from builders.sae_metrics import encode
    from builders.sae_step import decoded
    from builders.sae_training import Training

    config = SaeConfig(k=shape["k"], learning_rate=shape["rate"], select=select, steps=1)
    training = Training(start, 1.0, config)

    def reconstruct(x: Any) -> Any:
        weights = {name: w.to(x.device) for name, w in training.exported().items()}
        return decoded(encode(x, weights, config), weights["W_dec"]) + weights["b_dec"]

    return training.step, reconstruct


def saelens(shape: dict[str, Any], start: dict[str, Any], sparse: bool, autocast: bool) -> Contender:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sizes = {"d_in": shape["d"], "d_sae": shape["m"], "k": shape["k"], "device": shape["device"]}
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(**sizes, use_sparse_activations=sparse))
    for name, value in start.items():
        getattr(sae, name).data.copy_(value)
    config = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=shape["batch"],
        lr=shape["rate"],
        lr_end=shape["rate"],
        autocast=autocast,
        device=shape["device"],
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=iter(()))

    def step(x: Any) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return step, sae


def sparsify(shape: dict[str, Any], start: dict[str, Any], optimizer: str, autocast: bool) -> Contender:
    from sparsify import SparseCoder, SparseCoderConfig

    d, m, k = shape["d"], shape["m"], shape["k"]
    sae = SparseCoder(d, SparseCoderConfig(num_latents=m, k=k), shape["device"], dtype=torch.float32)
    for target, name in ((sae.encoder.weight, "W_enc"), (sae.encoder.bias, "b_enc"), (sae.W_dec, "W_dec")):
        target.data.copy_(start[name].T if name == "W_enc" else start[name])
    sae.b_dec.data.copy_(start["b_dec"])
    adam = _sparsify_optimizer(sae, m, optimizer, shape["rate"])
    since_fired, fired = (torch.zeros(m, dtype=t, device=shape["device"]) for t in (torch.long, torch.bool))

    def step(x: Any) -> float:  # what sparsify.Trainer.fit does with the outputs of a hooked module
        sae.set_decoder_norm_to_unit_norm()
        variance = (x - x.mean(0)).pow(2).sum()
        with torch.autocast(shape["device"], torch.bfloat16, enabled=autocast):
            out = sae(x, total_variance=variance)
        fired[out.latent_indices.flatten()] = True
        loss = float(out.fvu.detach())
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        since_fired.add_(len(x))
        since_fired[fired] = 0
        fired.zero_()
        return loss

    def reconstruct(x: Any) -> Any:
        if optimizer == "signum":
            adam.eval()
        return sae(x).sae_out

    return step, reconstruct


def _sparsify_optimizer(sae: Any, m: int, optimizer: str, rate: float) -> Any:
    if optimizer == "signum":  # the default, with its default rate
        from schedulefree import ScheduleFreeWrapper
        from sparsify.sign_sgd import SignSGD

        groups = [{"params": sae.parameters(), "lr": 5e-3 / (m / 2**14) ** 0.5}]
        wrapped = ScheduleFreeWrapper(SignSGD(groups), momentum=0.95)
        wrapped.train()
        return wrapped
    return torch.optim.Adam(sae.parameters(), lr=rate, fused=optimizer == "fused")


def matmul(shape: dict[str, Any], start: dict[str, Any], dtype: str) -> Contender:
    """The product of a batch with the encoder alone: no trainer that reads all atoms can be faster."""
    W, batch = start["W_enc"], shape["batch"]
    if dtype == "int8":
        quantised = (W * 100).clamp(-127, 127).to(torch.int8)
        sums = torch.empty(batch, shape["m"], dtype=torch.int32, device=W.device)
        x8 = torch.ones(batch, shape["d"], dtype=torch.int8, device=W.device)
        return lambda x: torch._int_mm(x8, quantised, out=sums), lambda x: x
    W = W.to(getattr(torch, dtype))
    out = torch.empty(batch, shape["m"], dtype=W.dtype, device=W.device)
    x0 = torch.ones(batch, shape["d"], dtype=W.dtype, device=W.device)
    return lambda x: torch.mm(x0, W, out=out), lambda x: x


CONTENDERS: dict[str, tuple[str, Callable[..., Contender], tuple[Any, ...]]] = {
    "DACO": ("main", daco, ("auto",)),
    "DACO, float32": ("main", daco, ("float32",)),
    "SAELens": ("saelens", saelens, (False, False)),
    "SAELens, sparse activations": ("saelens", saelens, (True, False)),
    "SAELens, autocast": ("saelens", saelens, (False, True)),
    "sparsify": ("sparsify", sparsify, ("signum", False)),
    "sparsify, Adam": ("sparsify", sparsify, ("adam", False)),
    "sparsify, fused Adam": ("sparsify", sparsify, ("fused", False)),
    "sparsify, fused Adam, autocast": ("sparsify", sparsify, ("fused", True)),
    "matmul, float32": ("main", matmul, ("float32",)),
    "matmul, bfloat16": ("main", matmul, ("bfloat16",)),
    "matmul, int8": ("main", matmul, ("int8",)),
}
"""Name: environment, what makes it, with what."""


MODULES = {"main": "builders.sae_training", "saelens": "sae_lens", "sparsify": "sparsify"}
"""Imported before memory is looked at."""


def memory(field: str, device: str) -> int:
    """Bytes of this process's memory, or of its GPU's: `VmHWM` (the most so far) or `VmRSS` (now)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if field == "VmHWM" else torch.cuda.memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    sys.path.insert(0, str(Path(__file__).parent.parent))
    shape = json.loads((folder / "shape.json").read_text())
    torch.set_num_threads(shape["threads"])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print where answers go
    tokens = np.memmap(folder / "tokens.f32", np.float32, "r").reshape(-1, shape["d"])
    importlib.import_module(MODULES[CONTENDERS[name][0]])
    device = shape["device"]
    start, before = load_file(folder / "start.safetensors", device=device), memory("VmRSS", device)
    step, reconstruct = CONTENDERS[name][1](shape, start, *CONTENDERS[name][2])
    if device == "cuda":  # where several contenders share the memory, and it can be counted from here on
        del start
        torch.cuda.reset_peak_memory_stats()
    for line in sys.stdin:
        command, *rest = line.split()
        if command == "step":
            first, n = map(int, rest)
            rows = torch.from_numpy(tokens[first : first + n * shape["batch"]].copy()).to(device)
            before = rows.nbytes if device == "cuda" else before
            answer = timed(step, rows.split(shape["batch"]), device)
            answer["peak"] = memory("VmHWM", device) - before
        else:
            answer = {
                "fve": fve(tokens[-shape["held_out"] :], reconstruct, device),
                "torch": torch.__version__,
            }
        print(json.dumps(answer), file=answers, flush=True)


def timed(step: Callable[[Any], Any], batches: Sequence[Any], device: str) -> dict[str, float]:
    """Seconds a step; on a GPU CPU time says nothing, and stands for the clock's."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    for x in batches:
        step(x)
    wait()
    wall, cpu = (time.perf_counter() - wall) / len(batches), (time.process_time() - cpu) / len(batches)
    return {"wall": wall, "cpu": wall if device == "cuda" else cpu}


@torch.no_grad()
def fve(tokens: Any, reconstruct: Callable[[Any], Any], device: str) -> float:
    """Fraction of variance explained on held-out tokens, relative to their mean."""
    held_out = torch.from_numpy(tokens.copy()).to(device)
    left = sum(float((x - reconstruct(x)).double().square().sum()) for x in held_out.split(512))
    return 1 - left / float((held_out - held_out.mean(0)).double().square().sum())


if __name__ == "__main__":
    main()
