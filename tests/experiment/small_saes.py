"""Small SAEs at random places, batches of a test's choice, and how close tensors are."""
import torch
import torch.nn.functional as F

D_IN, D_SAE, K = 10, 40, 4


def make(E, name, seed=0, d_in=D_IN, d_sae=D_SAE):
    """A variant all of whose common parameters are at random places, decoder rows at unit norm."""
    torch.manual_seed(seed)
    sae = E.SAE_VARIANTS[name](d_in, d_sae, K)
    with torch.no_grad():
        sae.W_dec.copy_(F.normalize(sae.W_dec + 0.2 * torch.randn(d_sae, d_in), dim=1))
        sae.b_enc.normal_(-0.1, 0.1)
        sae.b_dec.normal_(0, 0.1)
    return sae.train()


def batch_of(E, x, mask=None, doc_ids=None):
    rows, seq = x.shape[:2]
    doc_ids = torch.arange(rows) if doc_ids is None else torch.tensor(doc_ids)
    return E.Batch(x, torch.zeros(rows, seq, dtype=torch.long), doc_ids, torch.arange(1, seq + 1), mask)


def random_batch(E, seed=1, rows=4, seq=9, d_in=D_IN, mask=None, doc_ids=None):
    g = torch.Generator().manual_seed(seed)
    return batch_of(E, torch.randn(rows, seq, d_in, generator=g) / d_in ** 0.5, mask, doc_ids)


def padding(rows=4, seq=9):
    """Rows of 9, 4, 7 and 1 tokens."""
    return torch.arange(seq) < torch.tensor([9, 4, 7, 1])[:rows, None]


def encode_and_update(sae, batch):
    """The latents of a training batch, after which the state has changed as it does after a step."""
    with torch.no_grad():
        latents = sae.encode(batch)
        sae.after_step(batch, latents, torch.tensor(float(sae.k)))
    return latents


def close(got, wanted, tolerance=1e-5, what=""):
    assert got.shape == wanted.shape, what
    scale, worst = wanted.abs().max().item(), (got.double() - wanted.double()).abs().max().item()
    assert worst <= tolerance * max(scale, 1e-3), f"{what}: off by {worst:.2e} at a scale of {scale:.2e}"


def doubles(sae):
    return {n: p.detach().double().requires_grad_() for n, p in sae.named_parameters()}


def gradients(total, parameters):
    grads = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), grads)}


def true_scaled_variance(variance):
    v = variance.double()
    return (v / v.log().mean().exp()).clamp(1 / 16, 16)


def softplus(beta):
    return torch.log1p(torch.exp(beta))


def adaptive(E, seed=0, **kwargs):
    """Away from its starts: theta, beta, T, and variances over three orders of magnitude."""
    sae = make(E, "temporal_adaptation", seed, **kwargs)
    g = torch.Generator().manual_seed(seed + 50)
    with torch.no_grad():
        for name, value in (("beta", 0.3), ("theta_raw", 0.8), ("T", 0.7), ("T_decay", 0.4)):
            p = getattr(sae, name, None)
            if isinstance(p, torch.nn.Parameter):
                p.copy_(value + 0.3 * torch.randn(p.shape, generator=g) * (p.dim() > 0))
        sae.variance.copy_(10 ** (3 * torch.rand(sae.variance.shape, generator=g) - 3))
    return sae


def attending(E, seed=0, everything=False):
    """With open gates and every parameter of the attention at a size that shows; in evaluation, with a threshold
    that all latents pass where `everything` is set: z = ReLU(pre)."""
    sae = make(E, "temporal", seed)
    sae.attends = True
    g = torch.Generator().manual_seed(seed + 50)
    with torch.no_grad():
        sae.W_q.mul_(4.0)
        sae.W_k.mul_(4.0)
        sae.gate.copy_(torch.randn(sae.gate.shape, generator=g))
        if hasattr(sae, "P"):
            sae.P.mul_(5.0)
    if everything:
        sae.eval().threshold.fill_(-1e8)
    return sae
