"""The runtime's equations (DESIGN section 4) read aloud in numpy float64, to compare the real ones with.

Each is written the slow way, without sharing code with `daco`.
"""

import numpy as np


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows (or one vector) scaled to norm 1."""
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def encode(z, W_enc, b_enc, b_dec, activation="relu", k=None, threshold=None) -> np.ndarray:
    """`act((z - b_dec) W_enc + b_enc)`, one token and atom at a time; topk keeps the lower index in ties."""
    codes = np.zeros((len(z), W_enc.shape[1]))
    for row, token in enumerate(z):
        pre = [float(np.dot(token - b_dec, W_enc[:, i]) + b_enc[i]) for i in range(W_enc.shape[1])]
        value = [max(p, 0.0) for p in pre]
        if activation == "topk":
            kept = sorted(range(len(value)), key=lambda i: (-value[i], i))[:k]
        elif activation == "jumprelu":
            kept = [i for i, p in enumerate(pre) if p > threshold[i]]
        else:
            kept = range(len(value))
        for i in kept:
            codes[row, i] = value[i]
    return codes


def decode(c, W_dec, b_dec) -> np.ndarray:
    """`c W_dec + b_dec`."""
    return np.stack([sum(c[t, i] * W_dec[i] for i in range(len(W_dec))) + b_dec for t in range(len(c))])


def centroid(rows: np.ndarray) -> np.ndarray:
    """mu: the unit mean of unit rows."""
    return unit(unit(rows).mean(0))


def label(w, mu_undesirable, mu_desirable, eta: float) -> str:
    """Eq. 9 for one atom."""
    down, up = float(unit(w) @ mu_undesirable), float(unit(w) @ mu_desirable)
    if down >= eta and down > up:
        return "undesirable"
    if up >= eta and up > down:
        return "desirable"
    return "neutral"


def sae_steer(z, codes, W_dec, labels, gamma: float, R: float) -> np.ndarray:
    """`z - sum over undesirable c_i W_dec[i] + gamma R unit(sum of desirable rows)` (DESIGN 4.6)."""
    desirable = [W_dec[i] for i, name in enumerate(labels) if name == "desirable"]
    shift = gamma * R * unit(np.sum(desirable, 0)) if desirable and gamma else 0.0
    moved = []
    for token, code in zip(z, codes, strict=True):
        removed = [code[i] * W_dec[i] for i, name in enumerate(labels) if name == "undesirable"]
        moved.append(token - np.sum(removed, 0) + shift)
    return np.stack(moved)


def mop_alpha(z, D, fraction: float, tau: float) -> float:
    """`fraction * max |D z| / tau`, of one token."""
    return fraction * max(abs(float(row @ z)) for row in D) / tau


def mop_objective(z, D, c, alpha: float, tau: float) -> float:
    """`1/2 ||z - c D||^2 + alpha (tau ||c||_1 + (1 - tau)/2 ||c||^2)`, of one token."""
    return float(
        0.5 * np.sum((z - c @ D) ** 2) + alpha * (tau * np.sum(np.abs(c)) + (1 - tau) / 2 * np.sum(c**2))
    )


def mop_code(z, D, alpha: float, tau: float, non_negative: bool = False) -> np.ndarray:
    """The minimiser for one token, by scikit-learn's coordinate descent (its alpha is ours over d_model)."""
    from sklearn.linear_model import ElasticNet

    solver = ElasticNet(
        alpha=alpha / len(z),
        l1_ratio=tau,
        fit_intercept=False,
        positive=non_negative,
        tol=1e-14,
        max_iter=200_000,
    )
    return solver.fit(D.T, z).coef_


def mop_steer(z, codes, D, polarity, gamma: float = 0.0, R: float = 0.0) -> np.ndarray:
    """`z - sum over undesirable c_i D_i`, with the shift of 4.6."""
    return sae_steer(z, codes, D, polarity, gamma, R)


def project(z, D, polarity, rank: int, strength: float) -> np.ndarray:
    """`z - strength P z`, P the projector on mu- (rank 1) or on the leading undesirable directions."""
    rows = D[np.array(polarity) == "undesirable"]
    _, vectors = np.linalg.eigh(rows.T @ rows)
    basis = centroid(rows)[None] if rank == 1 else vectors[:, -rank:].T
    return z - strength * z @ (basis.T @ basis)


def actadd(z, D, polarity, strength: float, R: float) -> np.ndarray:
    """`z + strength R unit(mu+ - mu-)`."""
    mu = {name: centroid(D[np.array(polarity) == name]) for name in ("desirable", "undesirable")}
    return z + strength * R * unit(mu["desirable"] - mu["undesirable"])
