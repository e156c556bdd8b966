"""BERT, pre-trained by guessing masked tokens, on text files, on tokens, or, without data, on the standard library's source.

smlt train examples/bert.py --workers 2 --epochs 1 --global-batch-size 16
BERT_SIZE=large smlt train examples/bert.py --data tokens/ --workers 64 --global-batch-size 512

BERT_SIZE: small (67 M parameters, DistilBERT's size), medium (110 M, BERT-base) or large (335 M, BERT-large). BERT_TOKENS: of a
sample (128). Variables of your shell do not come to functions: there write a script of your own beside this one,

    from bert import Bert
    class BertLarge(Bert): size = "large"

bert_text.py says which files --data may hold; bert_tokens.py makes tokens of text.
"""

import os

import torch
from bert_text import MASK, VOCABULARY, open_text
from torch.nn import functional

import smlt
from smlt.errors import ConfigError

#: Of 15 % of the tokens, 80 % are hidden, 10 % exchanged, 10 % left: Devlin et al., NAACL 2019, section 3.1, arXiv:1810.04805
CHOSEN, HIDDEN, EXCHANGED = 0.15, 0.8, 0.1


def configuration(size):
    """transformers' configuration, which needs no download."""
    try:
        from transformers import BertConfig, DistilBertConfig
    except ImportError as error:
        raise ConfigError("BERT is built by transformers: pip install 'smlt[transformers]'") from error
    if size == "small":
        return DistilBertConfig(vocab_size=VOCABULARY)
    if size == "medium":
        return BertConfig(vocab_size=VOCABULARY)
    if size == "large":
        return BertConfig(
            vocab_size=VOCABULARY, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
        )
    raise ConfigError(f"BERT_SIZE={size}: choose small, medium or large")


class Bert(smlt.Task):
    size = os.environ.get("BERT_SIZE", "small")
    tokens = int(os.environ.get("BERT_TOKENS", "128"))
    lr = 1e-4

    def data(self):
        self.text = open_text(self, self.tokens)
        print(f"BERT {self.size} on {self.text.name}: {len(self.text.train):,} samples of {self.tokens} tokens")
        return {"train": self.text.train, "test": self.text.test}

    def configuration(self):
        return configuration(self.size)

    def model(self):
        from transformers import AutoModelForMaskedLM

        configuration = self.configuration()
        if self.tokens > configuration.max_position_embeddings:
            raise ConfigError(f"BERT_TOKENS={self.tokens}: BERT takes {configuration.max_position_embeddings} at most")
        return AutoModelForMaskedLM.from_config(configuration)

    def loss(self, model, tokens):
        # As many of each sample are chosen, so that the mean over workers is that over all.
        chosen = torch.rand(tokens.shape).argsort(1) < max(1, round(CHOSEN * tokens.shape[1]))
        fate = torch.rand(tokens.shape)
        seen = tokens.masked_fill(chosen & (fate < HIDDEN), MASK)
        others = torch.randint(MASK + 1, self.text.used, tokens.shape)
        seen = torch.where(chosen & (fate >= 1 - EXCHANGED), others, seen)
        return functional.cross_entropy(model(input_ids=seen).logits[chosen], tokens[chosen])

    def optimizer(self, model):
        return torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=0.01)

    def evaluate(self, model, tokens):
        chosen = torch.zeros(tokens.shape, dtype=torch.bool)
        chosen[:, 3::7] = True  # always the same, however the test set is cut
        scores = model(input_ids=tokens.masked_fill(chosen, MASK)).logits[chosen]
        accuracy = (scores.argmax(1) == tokens[chosen]).float().mean().item()
        return {"accuracy": accuracy, "test_loss": functional.cross_entropy(scores, tokens[chosen]).item()}


if __name__ == "__main__":
    Bert.main()
