"""A control for bench/table.py, which puts this class into its copy of experiment.py, before SAE_VARIANTS."""
from experiment import BatchTopK, n_tokens, Pairs, torch

HYSTERESIS = 0.5    # thresholds


class Hysteresis(BatchTopK):
    """BatchTopK with a memory that needs no training, a control for every temporal variant: in evaluation
    z_t = ReLU(pre_t) 1[pre_t + HYSTERESIS theta 1[z_{t-1} > 0] > theta], with theta raised from BatchTopK's threshold until the
    first training batch has L0 = TARGET_L0."""
    architecture = "hysteresis"

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.first = None  # the first training batch
        self.raised = None  # theta of the present parameters; None: to be computed

    def initialise(self, batch):
        """Needs the batch later, for theta."""
        self.first = batch

    def select(self, centred, W_enc, batch):
        """Returns BatchTopK's Pairs; in evaluation those of the active latents."""
        if self.training:
            return super().select(centred, W_enc, batch)
        if self.raised is None:
            self.raised = self.raised_threshold()
        pre_acts = torch.addmm(self.b_enc, centred, W_enc)
        active = self.active(pre_acts.view(*batch.x.shape[:2], -1), self.raised)
        return Pairs.from_flat(active.flatten().nonzero().flatten(), pre_acts)

    def active(self, pre_acts, theta):
        """Returns where latents are active [batch, seq, d_sae], of pre_acts of the same shape."""
        active = pre_acts > theta
        for t in range(1, active.shape[1]):
            bonus = HYSTERESIS * theta * active[:, t - 1]
            active[:, t] = (pre_acts[:, t] > 0) & (pre_acts[:, t] + bonus > theta)
        return active

    def raised_threshold(self):
        """Returns theta, by bisection; before training BatchTopK's threshold."""
        if self.first is None:
            return self.threshold.clone()
        pre_acts = (self.first.x - self.b_dec) @ self.W_enc + self.b_enc
        low, high = self.threshold, 4 * self.threshold
        for _ in range(16):
            middle = (low + high) / 2
            active = self.active(pre_acts, middle)
            if self.first.mask is not None:
                active &= self.first.mask[..., None]
            low, high = (middle, high) if active.sum() > self.k * n_tokens(self.first) else (low, middle)
        return high

    def after_step(self, batch, latents, l0):
        """Also theta is no longer that of the parameters."""
        super().after_step(batch, latents, l0)
        self.raised = None
