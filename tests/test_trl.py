"""Against TRL: each loss equals TRL's own function, and its ORPOTrainer with our loss gives our numbers."""

import json
import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, random_pairs, tiny_model
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import asft
from data import pack
from model import save_model

ALONE = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
)
LENGTHS_W, LENGTHS_L = torch.tensor([3, 17, 1, 40, 8, 2]), torch.tensor([5, 9, 2, 61, 30, 1])


def bare(trainer: type, **attributes):
    """A trainer that has just the attributes that its loss reads."""
    made = object.__new__(trainer)
    made.__dict__.update(accelerator=ALONE, **attributes)
    return made


def trl_orpo_align(w, l, beta):
    return -bare(ORPOTrainer, beta=beta).odds_ratio_loss(w, l)[0]


def trl_simpo(w, l, beta, gamma):
    trainer = bare(
        CPOTrainer, beta=beta, alpha=0.0, label_smoothing=0.0, loss_type="simpo", simpo_gamma=gamma
    )
    return trainer.cpo_loss(w, l)[0]


def trl_dpo(kind, sum_w, sum_l, ref_w, ref_l, beta):
    """DPOTrainer's loss of each pair, from a pretended model that puts a whole sum on a response's first token."""
    trainer = bare(
        DPOTrainer,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        ld_alpha=None,
        beta=beta,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        f_alpha_divergence_coef=0.5,
        loss_types=[kind],
        loss_weights=[1.0],
        label_smoothing=0.0,
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    losses = []
    for i in range(len(sum_w)):
        lengths = torch.stack([LENGTHS_W[i], LENGTHS_L[i]])
        width = int(lengths.max())
        mask = torch.zeros(2, width + 1, dtype=torch.long)
        mask[:, 1:] = torch.arange(width) < lengths[:, None]
        first = torch.zeros(2, width, dtype=sum_w.dtype)
        first[:, 0] = 1
        nothing = torch.zeros(2, width)
        output = SimpleNamespace(
            log_probs=torch.stack([sum_w[i], sum_l[i]])[:, None] * first,
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
        )
        batch = {
            "input_ids": torch.zeros_like(mask),
            "attention_mask": torch.ones_like(mask),
            "completion_mask": mask,
            "ref_chosen_logps": ref_w[i : i + 1],
            "ref_rejected_logps": ref_l[i : i + 1],
        }
        losses.append(trainer._compute_loss(lambda **_: output, batch, return_outputs=False))  # noqa: B023
    return torch.stack(losses)


def random_logps(seed=0):
    """Mean log-probs of chosen, rejected and their references, and the sums."""
    generator = torch.Generator().manual_seed(seed)
    means = [-torch.empty(6).uniform_(0.05, 4, generator=generator) for _ in range(4)]
    return means, [
        mean * length for mean, length in zip(means, (LENGTHS_W, LENGTHS_L) * 2, strict=True)
    ]


def same(ours, theirs, *inputs):
    """Values and gradients within 1e-6, relative to the largest."""
    for a, b in zip(
        (ours, *torch.autograd.grad(ours.sum(), inputs, retain_graph=True)),
        (theirs, *torch.autograd.grad(theirs.sum(), inputs)),
        strict=True,
    ):
        torch.testing.assert_close(
            a, b, rtol=1e-6, atol=1e-6 * max(1.0, float(b.detach().abs().max()))
        )


def leaves(*tensors):
    return [x.clone().requires_grad_() for x in tensors]


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_align_term_of_orpo_is_trls(beta):
    w, l = leaves(*random_logps()[0][:2])
    ours, metrics = asft.orpo_loss(w, l, beta=beta)
    # TRL's SFT term pools the tokens of prompts and responses over the batch; ours is each response's own mean.
    same(ours, -w + trl_orpo_align(w, l, beta), w, l)
    torch.testing.assert_close(beta * metrics["align"], trl_orpo_align(w, l, beta).detach())


def test_simpo_is_trls_without_its_sft_term():
    w, l = leaves(*random_logps()[0][:2])
    same(asft.simpo_loss(w, l, beta=2.0, gamma=1.0)[0], trl_simpo(w, l, 2.0, 1.0), w, l)
    same(asft.simpo_loss(w, l, beta=2.5, gamma=0.3)[0], trl_simpo(w, l, 2.5, 0.3), w, l)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_is_trls(beta):
    sums = random_logps()[1]
    w, l = leaves(*sums[:2])
    same(
        asft.dpo_loss(w, l, *sums[2:], beta=beta)[0],
        trl_dpo("sigmoid", w, l, *sums[2:], beta),
        w,
        l,
    )


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_ipo_of_means_is_trls(beta):
    means, sums = random_logps()
    w, l = leaves(*sums[:2])
    ours = asft.ipo_loss(w / LENGTHS_W, l / LENGTHS_L, *means[2:], beta=beta)[0]
    same(ours, trl_dpo("ipo", w, l, *sums[2:], beta), w, l)


def readme_subclass() -> type:
    code = re.search(r"<!-- trl -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[
        1
    ]
    scope: dict = {}
    exec(code, scope)
    return scope["ASFTTrainer"]


def test_trls_orpo_trainer_with_our_loss_gives_the_loss_and_gradients_of_our_packed_path(tmp_path):
    ours = tiny_model(std=0.3)
    save_model(ours, tmp_path / "model", dtype=torch.float32)
    # Each token is a word, so that TRL's own tokenisation gives these very ids; 0 begins a prompt, 1 ends a response.
    pairs = random_pairs([(5, 7, 4), (9, 3, 8), (2, 12, 6), (7, 5, 5)], vocab_size=95)
    for pair in pairs:
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            ids[:] = ids % 90 + 3
        pair.prompt[0], pair.chosen[-1], pair.rejected[-1] = 0, 1, 1
    words = [f"<{i}>" if i < 3 else f"t{i}" for i in range(97)]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="none")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<0>", eos_token="<1>", pad_token="<2>"
    )
    names = ("prompt", "chosen", "rejected")
    rows = [
        {
            name: " " * (name != "prompt") + " ".join(words[i] for i in getattr(pair, name))
            for name in names
        }
        for pair in pairs
    ]
    arguments = ORPOConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        beta=0.3,
        max_length=64,
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
    )
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    trainer = readme_subclass()(
        model=theirs,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    (batch,) = trainer.get_train_dataloader()
    for pair, chosen, rejected in zip(
        pairs, batch["chosen_input_ids"], batch["rejected_input_ids"], strict=True
    ):
        for ids, response in ((chosen, pair.chosen), (rejected, pair.rejected)):
            whole = [*pair.prompt.tolist(), *response.tolist()]
            assert ids[: len(whole)].tolist() == whole
    loss, metrics = trainer.get_batch_loss_metrics(theirs, batch)
    loss.backward()

    mean_R, _ = ours(pack(pairs))
    losses, _ = asft.asft_loss(mean_R[0::2], mean_R[1::2], beta=0.3)
    losses.mean().backward()
    assert loss.item() == pytest.approx(losses.mean().item(), rel=1e-5)
    assert metrics["margin"].item() == pytest.approx(
        (mean_R[0::2] - mean_R[1::2]).mean().item(), rel=1e-4
    )
    gradients = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(
            gradients[key].grad,
            parameter.grad,
            rtol=1e-4,
            atol=1e-5 * float(parameter.grad.abs().max()),
            msg=key,
        )
    assert json.dumps({name: float(value) for name, value in metrics.items()})
