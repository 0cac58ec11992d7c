"""Rivals of `slow` for bench/table.py, which puts these classes into its copy of experiment.py, before SAE_VARIANTS."""
from experiment import (
    BatchTopK, F, Latents, MASKED_PRE_ACT, nn, TopK, torch, zero_padding)

TFA_HEADS, TFA_CHANNELS = 4, 24    # of the attention; channels of queries and keys, a 64th of the latents
CROSS_WINDOW = 2    # tokens that share the crosscoder's latents
CROSS_K = 1.0    # latents of a window / TARGET_L0


class TFA(TopK):
    """Temporal feature analysis (arXiv 2511.01836): x_hat = z_n D + p + b. u_t = ReLU((x_t - b) D^T); p_t is the projection of
    x_t on ReLU(attention of u_t over u_{t-1}, u_{t-2}, ... W_o) D, a dense predictive part that takes no place; z_n =
    TopK((x - b - p) D^T + b_enc), the novel codes, which alone are its latents here."""
    architecture = "tfa"

    def __init__(self, *sizes):
        super().__init__(*sizes)
        d = self.d_sae
        self.W_q, self.W_k = (nn.Parameter(torch.randn(d, TFA_CHANNELS) * d ** -0.5) for _ in range(2))
        self.W_v, self.W_o = (nn.Parameter(torch.randn(d, d) * d ** -0.5) for _ in range(2))

    @property
    def W_enc(self):
        return self.W_dec.t()

    def predicted(self, batch):
        """Returns p [batch, seq, d_in]."""
        x = zero_padding(batch, batch.x - self.b_dec)
        u = F.relu(x @ self.W_enc)
        before = F.pad(u[:, :-1], (0, 0, 1, 0))
        q, k, v = (part.unflatten(-1, (TFA_HEADS, -1)).transpose(1, 2)
                   for part in (u @ self.W_q, before @ self.W_k, before @ self.W_v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        direction = F.normalize(F.relu(mixed @ self.W_o) @ self.W_dec, dim=-1, eps=1e-6)
        return (x * direction).sum(-1, keepdim=True) * direction

    def encode(self, batch):
        """Returns the novel codes; their `extra` is p."""
        p = self.predicted(batch)
        return super().encode(batch._replace(x=batch.x - p))._replace(extra=p)

    def decode(self, latents):
        return super().decode(latents) + latents.extra


class Crosscoder(BatchTopK):
    """A temporal crosscoder: the tokens of a window of CROSS_WINDOW share latents, z = BatchTopK(sum_j (x_j - b) W_enc_j +
    b_enc), x_hat_j = z W_dec_j + b, where windows do not overlap. CROSS_K TARGET_L0 latents a window: as many are active at
    each of its tokens."""
    architecture = "crosscoder"
    causal = False

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.k = self.k * CROSS_K
        turned = [torch.randn(self.d_sae, self.d_in) * 0.3 * self.d_in ** -0.5 for _ in range(CROSS_WINDOW)]
        self.offsets = nn.Parameter(torch.stack(turned))    # W_dec_j = W_dec + offset_j
        self.W_encs = nn.Parameter(torch.stack([(self.W_dec.data + turn).t() for turn in turned]) / CROSS_WINDOW)

    @property
    def W_enc(self):
        return self.W_encs.mean(0)

    def of_windows(self, values):
        """Returns values [batch, seq, n] as [batch, windows, CROSS_WINDOW, n], with zeros after the end."""
        rest = -values.shape[1] % CROSS_WINDOW
        return F.pad(values, (0, 0, 0, rest)).unflatten(1, (-1, CROSS_WINDOW))

    def encoder_inputs(self, batch):
        """Returns, at each token, the activations of its window side by side."""
        x = self.of_windows(zero_padding(batch, batch.x)).flatten(2).repeat_interleave(CROSS_WINDOW, 1)
        return x[:, :batch.x.shape[1]], self.b_dec.repeat(CROSS_WINDOW), self.W_encs.flatten(0, 1)

    def encode(self, batch):
        """Returns the Latents: those of a window at each of its tokens."""
        x = self.of_windows(zero_padding(batch, batch.x)).flatten(2)
        centre, W_enc = self.b_dec.repeat(CROSS_WINDOW), self.W_encs.flatten(0, 1)
        pre_acts = torch.addmm(self.b_enc, x.flatten(0, 1) - centre, W_enc).view(*x.shape[:2], -1)
        used = self.of_windows(zero_padding(batch, torch.ones_like(batch.x[..., :1]))).amax((2, 3)) > 0
        pre_acts = pre_acts.masked_fill(~used[..., None], MASKED_PRE_ACT)
        if self.training:
            keep = int(self.k * used.sum())
            least = pre_acts.detach().flatten().topk(keep).values.amin().clamp_min(1e-12)
        else:
            least = self.threshold
        self.last = least
        z = (pre_acts * (pre_acts >= least)).repeat_interleave(CROSS_WINDOW, 1)[:, :batch.x.shape[1]]
        return Latents.from_dense(zero_padding(batch, F.relu(z)))

    def decode(self, latents):
        z = self.of_windows(latents.dense())
        return torch.einsum("bwjn,jnd->bwjd", z, self.W_dec + self.offsets).flatten(1, 2)[:, :latents.shape[1]] + self.b_dec

    def after_step(self, batch, latents, l0):
        self.follow(batch, self.last[None], self.threshold, self.last_least_kept)
