"""Makes all that `python train.py` runs when told nothing: a tiny Llama 3, its tokenizer, and preference pairs.

    python examples/make.py             writes model/, train.jsonl and heldout.jsonl beside it, in about two minutes

In reading order
    NAMES ... ASKED         the words that everything is made of
    request ... greet       the eight kinds of pairs: each draws a prompt, a good answer and a bad one
    draw, draw_all          pairs whose prompts are new
    record, write           a pair as JSON; between them, the kinds show the formats that train.py reads
    make_tokenizer          byte-level BPE with Llama 3's control tokens
    pretrain                the model learns to give good and bad answers equally often
    report, main            writes all, reads it back, and prints each kind's accuracy
 A kind's good and bad answers have as many wordings of about the same lengths, so that before ASFT neither side is the
likelier one. A held-out prompt occurs nowhere else, but its words do: the model must put them together anew.
 Runs on one CPU thread and gives the same bytes each time (another processor or torch may round the weights otherwise).

Left out: all that a language model should know. This one can answer prompts like these and nothing else.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from data import ChatFormat, Preference, Turns, encode_preferences, pack, read_preferences  # noqa: E402
from model import Llama, LlamaConfig, load_model, save_model  # noqa: E402

SEED = 0
TRAIN, HELD_OUT = 225, 25  # pairs of each kind
STEPS, PAIRS_OF_A_KIND, RATE = (
    1400,
    2,
    4e-3,
)  # of pretraining: updates, fresh pairs of each kind in one, peak rate
VOCABULARY = 512

# --------------------------------------------------------------------------------------------------- kinds of pairs

NAMES = (
    "Ada Ben Cleo Dan Eva Finn Gus Hana Ian Jill Kofi Lena Max Nora Omar Pia Ravi Rosa Sam Tess Uma Vic Wes "
    "Zoe"
).split()
TASKS = {
    "bake": "bread cake pie",
    "clean": "car room shoes",
    "draw": "cat house tree",
    "feed": "cat dog fish",
    "fix": "bike car roof",
    "open": "box door jar",
    "paint": "boat door wall",
    "wash": "bike dishes shirt",
}
WORDS = (
    "apple bike bird boat book box bread cake car cat chair clock cloud cup dog door fish flower garden hat house "
    "jar lamp leaf moon pie river road roof room shirt shoe star sun table train tree wall window wolf"
).split()
PETS = "bird cat dog fish fox goat hen mouse pony".split()
COLOURS = "black blue brown green orange pink red white yellow".split()
OPPOSITES = (
    "big small, cold hot, dark light, dry wet, early late, empty full, fast slow, good bad, happy sad, "
    "hard soft, high low, loud quiet, near far, old young, open closed, rich poor, sharp blunt, short long, "
    "strong weak, true false"
).split(", ")
KNOWN = {  # "opposite of", "hot", "cold": the opposite of hot is cold
    "opposite of": [words.split()[::way] for words in OPPOSITES for way in (1, -1)],
    "colour of": [
        ("blood", "red"),
        ("chalk", "white"),
        ("coal", "black"),
        ("grass", "green"),
        ("the sky", "blue"),
    ],
    "plural of": [
        ("child", "children"),
        ("foot", "feet"),
        ("goose", "geese"),
        ("mouse", "mice"),
        ("tooth", "teeth"),
    ],
    "capital of": [
        ("Egypt", "Cairo"),
        ("France", "Paris"),
        ("Greece", "Athens"),
        ("Italy", "Rome"),
        ("Peru", "Lima"),
    ],
}
FACTS = [(f"{relation} {x}", y) for relation, known in KNOWN.items() for x, y in known]
ASKED = [
    "What is the {}?",
    "Tell me the {}.",
    "Do you know the {}?",
    "Please name the {}.",
    "I forgot the {}.",
    "And the {}?",
]

Drawn = tuple[Turns, str, str]  # the turns before the answer, a good answer, a bad one
Kind = Callable[[Random], Drawn]


def request(rng: Random) -> Drawn:
    """Courteous help, not a refusal."""
    verb, name = rng.choice(list(TASKS)), rng.choice(NAMES)
    task = f"{verb} the {rng.choice(TASKS[verb].split())}"
    ask = rng.choice(["Could you", "Can you please", "Will you", "Would you"])
    good = [
        f"Of course! I will {task} for {name}.",
        f"Sure, I will {task}.",
        f"Yes, I will do it for {name}.",
    ]
    bad = [
        f"No, I will never {task} for {name}.",
        f"You can {task} yourself.",
        f"Why should I do it for {name}?",
    ]
    return [("user", f"{ask} {task} for {name}?")], rng.choice(good), rng.choice(bad)


def count(rng: Random) -> Drawn:
    """In the direction asked for, up or down, not in the other."""
    first = rng.randint(1, 40)
    numbers = [str(i) for i in range(first, first + 4)][:: rng.choice([1, -1])]
    ask = rng.choice(
        [
            "Count from {} to {}.",
            "Please count from {} to {}.",
            "I want the numbers from {} to {}.",
            "Name the numbers from {} to {}.",
        ]
    )
    return (
        [("user", ask.format(numbers[0], numbers[-1]))],
        ", ".join(numbers),
        ", ".join(numbers[::-1]),
    )


def remember(rng: Random) -> Drawn:
    """What the user said in an earlier turn, not that it was never said."""
    said = {
        "name": rng.choice(NAMES),
        "pet": "a " + rng.choice(PETS),
        "favourite colour": rng.choice(COLOURS),
    }
    one, two = rng.sample(list(said), 2)
    asked = rng.choice([one, two])
    ask = rng.choice(["What is my {}?", "Do you remember my {}?", "Tell me my {}."])
    good = [f"Your {asked} is {said[asked]}.", f"I remember that your {asked} is {said[asked]}."]
    bad = [
        f"You never told me what your {asked} is.",
        f"How should I know your {asked}? Ask your mother.",
    ]
    return (
        [
            ("user", f"My {one} is {said[one]} and my {two} is {said[two]}."),
            ("assistant", "Nice to meet you."),
            ("user", ask.format(asked)),
        ],
        rng.choice(good),
        rng.choice(bad),
    )


def fact(rng: Random) -> Drawn:
    """The answer, not a shrug."""
    x, y = rng.choice(FACTS)
    good = [f"It is {y}.", f"The {x} is {y}.", f"That is easy: the {x} is {y}."]
    bad = ["Who knows?", f"I do not care about the {x}.", f"Look up the {x} yourself."]
    return [("user", rng.choice(ASKED).format(x))], rng.choice(good), rng.choice(bad)


def letters(rng: Random) -> Drawn:
    """In the letters asked for, not as it came."""
    word, capital = rng.choice(WORDS), rng.random() < 0.5
    ask = rng.choice(
        [
            "Write this word in {} letters.",
            "Please use {} letters.",
            "Show me this in {} letters:",
            "In {} letters, please:",
        ]
    ).format("capital" if capital else "small")
    given, good = (word, word.upper()) if capital else (word.upper(), word)
    return [("user", f"{ask}\n{given}")], good, given


def brief(rng: Random) -> Drawn:
    """As long as the system turn says."""
    x, y = rng.choice(FACTS)
    short, long = f"{y.capitalize()}.", f"The {x} is {y}."
    system, good, bad = rng.choice(
        [("Answer in one word.", short, long), ("Answer in a full sentence.", long, short)]
    )
    return [("system", system), ("user", rng.choice(ASKED).format(x))], good, bad


def persona(rng: Random) -> Drawn:
    """As the system turn says: like a pirate or like a butler."""
    name = rng.choice(NAMES)
    pirate = rng.choice(
        [f"Ahoy, {name}! Come aboard.", f"Arr, {name}, what do ye want on me ship?"]
    )
    butler = rng.choice([f"Welcome, {name}. May I take your coat?", f"At your service, {name}."])
    who, good, bad = rng.choice([("a pirate", pirate, butler), ("a butler", butler, pirate)])
    system = rng.choice(["You are {}.", "Talk like {}.", "Answer as {} would."])
    hello = rng.choice(
        [
            "Hello, I am {}.",
            "Hi! My name is {}.",
            "Good day, {} here.",
            "It is me, {}.",
            "{} is back.",
        ]
    )
    return [("system", system.format(who)), ("user", hello.format(name))], good, bad


def greet(rng: Random) -> Drawn:
    """A greeting returned, not scorned."""
    name, day = rng.choice(NAMES), f"good {rng.choice(['morning', 'afternoon', 'evening'])}"
    hello = rng.choice(
        ["{}, I am {}.", "{}! {} here.", "{} from {}.", "{}, my name is {}.", "{}! I am {}."]
    )
    good = [
        f"{day.capitalize()}, {name}!",
        f"A {day} to you, {name}! How are you?",
        f"Hello {name}, may I help you?",
    ]
    bad = [
        f"Not you, {name}!",
        f"Was it not a {day} before, {name}?",
        f"Go home {name}, I am busy.",
    ]
    return [("user", hello.format(day.capitalize(), name))], rng.choice(good), rng.choice(bad)


KINDS: list[Kind] = [request, count, remember, fact, letters, brief, persona, greet]


def draw(kind: Kind, rng: Random, taken: set[str]) -> Drawn:
    """A pair of this kind with a prompt that is not taken."""
    while str((drawn := kind(rng))[0]) in taken:
        pass
    return drawn


def draw_all(each: int, rng: Random, taken: set[str]) -> list[Drawn]:
    """So many pairs of each kind, the kinds in turn. Takes their prompts."""
    pairs = []
    for _ in range(each):
        for kind in KINDS:
            pairs.append(draw(kind, rng, taken))
            taken.add(str(pairs[-1][0]))
    return pairs


# ------------------------------------------------------------------------------------------------------------ files


def record(kind: Kind, drawn: Drawn) -> dict:
    """A pair in its kind's format."""
    turns, good, bad = drawn
    prompt = [{"role": role, "content": content} for role, content in turns]
    chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in (good, bad))
    if kind is remember:  # two whole conversations, which must agree up to the last turn
        return {"chosen": prompt + chosen, "rejected": prompt + rejected}
    if kind is persona:  # messages
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if kind is brief:  # LLaMA-Factory's sharegpt
        return {
            "system": turns[0][1],
            "conversations": [{"from": "human", "value": turns[1][1]}],
            "chosen": {"from": "gpt", "value": good},
            "rejected": {"from": "gpt", "value": bad},
        }
    if kind is letters:  # LLaMA-Factory's alpaca
        instruction, text = turns[0][1].split("\n")
        return {"instruction": instruction, "input": text, "chosen": good, "rejected": bad}
    return {"prompt": turns[0][1], "chosen": good, "rejected": bad}


def write(path: Path, pairs: list[Drawn]) -> None:
    """A pair a line. What train.py will read must be the pairs."""
    path.write_text(
        "".join(
            json.dumps(record(KINDS[i % len(KINDS)], drawn)) + "\n" for i, drawn in enumerate(pairs)
        )
    )
    assert [(p.prompt, p.chosen, p.rejected) for p in read_preferences(path)] == pairs


CONTROL = [
    f"<|{name}|>"
    for name in "begin_of_text end_of_text start_header_id end_header_id eom_id eot_id".split()
]


def make_tokenizer(pairs: list[Drawn]) -> Tokenizer:
    """Byte-level BPE: 256 bytes, merges learned from the pairs, and the control tokens at the end of the vocabulary."""
    texts = [
        text for turns, *answers in pairs for text in (*(content for _, content in turns), *answers)
    ]
    texts += ["system", "user", "assistant", "\n\n"] * len(
        pairs
    )  # what headers are made of: a token each
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [  # a number is the same token after a space and after none
            pre_tokenizers.Digits(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(CONTROL),
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in CONTROL]
    )
    tokenizer.post_processor = (
        processors.TemplateProcessing(  # as Llama 3's does; ChatFormat does without
            single=f"{CONTROL[0]} $A",
            special_tokens=[(CONTROL[0], tokenizer.token_to_id(CONTROL[0]))],
        )
    )
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


# -------------------------------------------------------------------------------------------------------- the model


def pretrain(model: Llama, chat: ChatFormat, rng: Random, held_out: set[str]) -> None:
    """Fresh pairs each step, none with a held-out prompt. Good and bad answers weigh the same."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, STEPS, pct_start=0.1, cycle_momentum=False
    )
    for step in range(1, STEPS + 1):
        drawn = [draw(kind, rng, held_out) for kind in KINDS for _ in range(PAIRS_OF_A_KIND)]
        pairs = encode_preferences(
            [Preference(*one, "drawn") for one in drawn], chat, max_tokens=512
        )
        mean_R, _ = model(pack(pairs))
        loss = -mean_R.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}/{STEPS} loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def report(directory: Path, path: Path) -> None:
    """Each kind's accuracy, from the files. Half is wanted: the rest is for ASFT."""
    pairs = encode_preferences(read_preferences(path), ChatFormat(directory), max_tokens=512)
    mean_R, _ = load_model(directory)(pack(pairs))
    right_B = (mean_R[0::2] > mean_R[1::2]).float()
    kinds = [
        f"{kind.__name__} {right_B[i :: len(KINDS)].mean():.0%}" for i, kind in enumerate(KINDS)
    ]
    print(f"{path.name}: {len(pairs):,} pairs, accuracy {right_B.mean():.1%} ({', '.join(kinds)})")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rng, taken = Random(SEED), set()
    held_out = draw_all(HELD_OUT, rng, taken)
    held_out_prompts = set(taken)
    train = draw_all(TRAIN, rng, taken)
    write(HERE / "heldout.jsonl", held_out)
    write(HERE / "train.jsonl", train)

    tokenizer = make_tokenizer(train)
    begin, end_of_text, _, _, end_of_message, end_of_turn = (
        tokenizer.token_to_id(token) for token in CONTROL
    )
    ends = [end_of_text, end_of_message, end_of_turn]
    model = Llama(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=begin,
            eos_token_id=tuple(ends),
        )
    )
    with tempfile.TemporaryDirectory() as aside:
        tokenizer.save(f"{aside}/tokenizer.json")
        generation = {"bos_token_id": begin, "eos_token_id": ends}
        Path(aside, "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        pretrain(model, ChatFormat(aside), rng, held_out_prompts)
        shutil.rmtree(HERE / "model", ignore_errors=True)
        save_model(model, HERE / "model", source=aside)
    for name in ("heldout.jsonl", "train.jsonl"):
        report(HERE / "model", HERE / name)


if __name__ == "__main__":
    main()
