"""Make the embedded prover's folder: a Llama of about 90,000 parameters for the states and tactics
of examples/propositional, without weights.

    python examples/tiny_prover/generate.py

A token is a name or a symbol, together with the spaces that always stand around it, so that
decoding is joining and a name is the same token wherever it stands. The training script initialises
the model from scratch. initializer_range is 1/sqrt(hidden): with the usual 0.02 a model of this
size does not overfit within the embedded experiment. head_dim is 32 because vLLM's CPU attention
takes no less.
"""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
NAMES = [
    *"ABCDEF",
    *(f"h{i}" for i in range(1, 13)),
    "False",
    "Prop",
    "inl",
    "inr",
    "mp",
    "mpr",
    "a",
]
BEFORE_SPACE = ["case", "intro", "exact", "apply", "obtain", "have", "cases", "⊢", ","]
BETWEEN_SPACES = ["→", "∧", "∨", "↔", ":", ":=", "|"]
WORDS = ["constructor", "left", "right", "exfalso", "assumption", "sorry"]
SYMBOLS = ["¬", "(", ")", "⟨", "⟩", ".", "---", " ", "\n"]
PATTERN = rf"(?:{'|'.join(BEFORE_SPACE[:-2])}|⊢|,) | (?::=|[→∧∨↔:|]) "
PATTERN += r"|:=|---|[A-Za-z][A-Za-z0-9_']*|[\s\S]"


def main():
    folder = Path(__file__).parent
    tokens = [
        *SPECIAL,
        *NAMES,
        *(f"{t} " for t in BEFORE_SPACE),
        *(f" {t} " for t in BETWEEN_SPACES),
        *WORDS,
        *SYMBOLS,
    ]
    vocabulary = {token: i for i, token in enumerate([*tokens, *BEFORE_SPACE, *BETWEEN_SPACES])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.125,
        tie_word_embeddings=False,
        bos_token_id=vocabulary["<s>"],
        eos_token_id=vocabulary["</s>"],
        pad_token_id=vocabulary["<pad>"],
    ).save_pretrained(folder)


if __name__ == "__main__":
    main()
