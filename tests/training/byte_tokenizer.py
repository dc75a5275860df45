"""A tokenizer small enough to reason about: one token a byte, and three special ones."""

import re
from types import SimpleNamespace

PAD, BOS, EOS = 0, 1, 2
SPECIAL = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS}
N_SPECIAL = len(SPECIAL)


class ByteTokenizer:
    """What fluxcompile asks of a tokenizer. ``chat``: with a chat template."""

    eos_token_id = EOS
    pad_token_id = PAD

    def __init__(self, chat: bool = True) -> None:
        self.chat_template = "[role] text <eos> and a newline" if chat else None

    def __len__(self) -> int:
        return 256 + N_SPECIAL

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        ids = [BOS] if add_special_tokens else []
        for part in re.split("(<pad>|<bos>|<eos>)", text):
            if part in SPECIAL:
                ids.append(SPECIAL[part])
            else:
                ids += [byte + N_SPECIAL for byte in part.encode()]
        return SimpleNamespace(input_ids=ids)

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        names = {number: name for name, number in SPECIAL.items()}
        pieces = [
            names[i].encode() if i in names else bytes([i - N_SPECIAL])
            for i in map(int, ids)
            if not (skip_special_tokens and i in names)
        ]
        return b"".join(pieces).decode(errors="replace")

    def apply_chat_template(self, messages, tokenize=True, add_generation_prompt=False) -> str:
        assert not tokenize
        turns = "".join(f"[{m['role']}] {m['content']}<eos>\n" for m in messages)
        return "<bos>" + turns + ("[assistant] " if add_generation_prompt else "")


class ForgetfulTokenizer(ByteTokenizer):
    """Its chat template drops all but the last turns, as some do with reasoning."""

    def apply_chat_template(self, messages, tokenize=True, add_generation_prompt=False) -> str:
        return super().apply_chat_template(messages[-2:], tokenize, add_generation_prompt)
