"""Look-ahead passes of a causal model in its own precision, and the same numbers from passes of their own."""

import torch
from torch import nn

from slsam_peft.algorithm.step import Cut, Passes, Riding
from slsam_peft.trainer.cutting import count_sequences, first_sequences, scored_items
from slsam_peft.trainer.joining import join


def token_losses(model, inputs):
    """Return the loss of each token as it is predicted, 0 where it is not scored, shape `(batch, length - 1)`."""
    arguments = {k: v for k, v in inputs.items() if k != "labels"}
    logits = model(**{**arguments, "use_cache": False}).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    return losses.view(labels.shape)


def summed(model, inputs, divisor, backward=True):
    """Run a pass over a batch; return its summed loss over `divisor`."""
    loss = token_losses(model, inputs).sum() / divisor
    if backward:
        loss.backward()
    return loss.detach()


def look_ahead_passes(model, inputs, coming, wanted=1):
    """Return the passes over a lone micro-batch, sequences of `coming` riding along where it is not `None`."""
    tokens = scored_items(inputs)
    part = first_sequences(inputs, wanted).inputs
    riding = None
    if coming is not None:
        joined = join(inputs, coming, wanted)
        own = joined.own[:, 1:]

        def both():
            with torch.no_grad():
                losses = token_losses(model, joined.inputs)
            return torch.stack([(losses * own).sum(), (losses * ~own).sum()])

        def run():
            losses = token_losses(model, joined.inputs)
            (losses.sum() / tokens).backward()
            return (losses.detach() * own).sum() / tokens

        riding = Riding(run, run, both, joined.own, joined.riding_items)
    return Passes(
        logged=lambda: summed(model, inputs, tokens),
        unlogged=lambda: summed(model, inputs, tokens),
        sequences=count_sequences(inputs),
        cut=lambda number: Cut(lambda: summed(model, part, tokens), scored_items(part)),
        items=tokens,
        divisor=tokens,
        riding=riding,
    )


def first_rows(inputs, count):
    """Return the first rows of a batch of padded texts."""
    return {k: v[:count] if torch.is_tensor(v) else v for k, v in inputs.items()}


def gradients_at(model, inputs, offsets):
    """Return the mean loss and every trained parameter's gradient of a batch at w + e; w is put back.

    Args:
        model: The model.
        inputs: The batch.
        offsets: e of each parameter that is moved.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    saved = {p: p.detach().clone() for p in offsets}
    model.zero_grad()
    with torch.no_grad():
        for p, e in offsets.items():
            p.add_(e)
    loss = summed(model, inputs, scored_items(inputs))
    with torch.no_grad():
        for p, w in saved.items():
            p.copy_(w)
    gradients = {p: None if p.grad is None else p.grad.clone() for p in parameters}
    model.zero_grad()
    return float(loss), gradients


def mean_gradients(model, inputs):
    """Return every trained parameter's gradient of a batch's mean loss at w."""
    return gradients_at(model, inputs, {})[1]


def exact_norms(model):
    """Let a model's norms compute in its own precision: in float32 they round each row by what lies beside it."""

    def forward(self, hidden):
        return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = forward.__get__(module)
    return model
