"""Small tokenizers of Gemma's manner for tests."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

CONTROL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>")
PIECES = ("▁", "a", "b", "é", "ab", "▁a", "END", "E", "N", "D", "🦄", "\n", "<", "|", ">", "turn", "user")


def byte_tokenizer(pieces: tuple[str, ...] = PIECES) -> Tokenizer:
    """Control tokens, the 256 bytes, then `pieces`, with Gemma's normaliser, pre-tokeniser and decoder."""
    names = (*CONTROL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces)
    vocabulary = {name: index for index, name in enumerate(names)}
    merges = [(left, right) for left in pieces for right in pieces if left + right in pieces]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL_TOKENS])
    return tokenizer
