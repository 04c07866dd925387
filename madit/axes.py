"""Dimension names, coordinate meanings and format versions: the words that every stage shares."""

from __future__ import annotations

FORMAT_VERSION = 1
"""Version of the store, of channel sets and of guidance configs. A newer one is refused."""

SAMPLE, STEP, BRANCH, BLOCK = "sample", "step", "branch", "block"
TOKEN, CHANNEL, QUANTILE, KIND = "token", "channel", "quantile", "kind"
STREAMS = ("img", "txt")
BRANCHES = ("cond", "uncond", "skip", "degraded")

FACTORS = ("latent", "timestep", "pooled_text", "text_tokens", "guidance")
"""Inputs of a DiT that a factorial design can set independently."""

QUANTILE_LEVELS = (0.01, 0.05, 0.10, 0.25, 0.50)
"""Levels of |h| over tokens that a store keeps: level 1 - q answers "a share q of the tokens exceeds"."""

STATISTICS = ("mean", "mean_abs", "mean_square", "max_abs")
"""Reductions over tokens that keep the channel dimension, in the unit of the residual stream."""

MEANING = {
    SAMPLE: "one (prompt, seed)",
    STEP: "index into the scheduler's timesteps",
    BRANCH: "cond, uncond (classifier-free guidance), skip (skip-layer call) or degraded (Detail Guidance)",
    BLOCK: "transformer block in forward order over all stacks",
    TOKEN: "position in the stream",
    CHANNEL: "dimension of the residual stream",
    QUANTILE: "level p: the ascending order statistic floor(p N) of |h| over tokens, no interpolation",
    "timestep": "what the transformer receives, in the model's own unit",
    "sigma": "noise level of the scheduler: z = (1 - sigma) x0 + sigma eps",
    "mean": "mean over tokens of h",
    "mean_abs": "mean over tokens of |h|",
    "mean_square": "mean over tokens of h^2",
    "max_abs": "maximum over tokens of |h|",
    "abs_quantile": "quantile over tokens of |h|",
    "median_abs": "median over tokens and channels of |h|",
    "activation": "the residual stream h",
    "recorded": "whether this (sample, step, branch) was written",
}
