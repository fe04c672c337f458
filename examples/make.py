"""Makes the example that `python train.py` runs: a tiny Llama 3, its tokenizer and its pairs.

    python examples/make.py         writes model/, train.jsonl and heldout.jsonl beside this file

In reading order
    NAMES ... ASKED         the words of all sentences
    request ... greet       eight kinds of pairs: each draws a prompt, a good and a bad answer
    draw, draw_all          draws pairs with prompts that no other pair has
    record, write           a pair as JSON; each kind uses one of the formats that train.py reads
    make_tokenizer          byte-level BPE with Llama 3's control tokens
    pretrain                trains the model to give good and bad answers equally often
    report, main            writes everything, reads it back, and prints each kind's accuracy

The good and the bad answers of a kind have equally many wordings of about equal length. So before
ASFT neither side is likelier. A held-out prompt is in no training pair, but its words are: the
model must combine them in a new way.

It takes about two minutes on one CPU thread and writes the same bytes each time. (Another processor
or another version of torch may round the weights differently.)

Left out: general knowledge of language. This model can only answer prompts like these.
"""

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import ChatFormat, Preference, Turns, encode_preferences, pack, read_preferences
from model import Llama, LlamaConfig, load_model
from support.export import save_model

HERE = Path(__file__).resolve().parent
SEED = 0
TRAIN, HELD_OUT = 225, 25  # pairs of each kind
STEPS, PAIRS_OF_A_KIND, RATE = 1400, 2, 4e-3  # pretraining: updates, pairs of a kind in each, rate
VOCABULARY = 512

# ---------------------------------------------------------------------------------- kinds of pairs


def columns(text: str) -> list[tuple[str, str]]:
    """'big small, the sky blue' -> ('big', 'small'), ('the sky', 'blue')."""
    return [tuple(words.rsplit(maxsplit=1)) for words in text.split(", ")]


NAMES = """Ada Ben Cleo Dan Eva Finn Gus Hana Ian Jill Kofi Lena Max Nora Omar Pia Ravi Rosa Sam
    Tess Uma Vic Wes Zoe""".split()
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
WORDS = """apple bike bird boat book box bread cake car cat chair clock cloud cup dog door fish
    flower garden hat house jar lamp leaf moon pie river road roof room shirt shoe star sun table
    train tree wall window wolf""".split()
PETS = "bird cat dog fish fox goat hen mouse pony".split()
COLOURS = "black blue brown green orange pink red white yellow".split()
OPPOSITES = columns(
    "big small, cold hot, dark light, dry wet, early late, empty full, fast slow, good bad, "
    "happy sad, hard soft, high low, loud quiet, near far, old young, open closed, rich poor, "
    "sharp blunt, short long, strong weak, true false"
)
KNOWN = {
    "opposite of": [pair[::way] for pair in OPPOSITES for way in (1, -1)],
    "colour of": columns("blood red, chalk white, coal black, grass green, the sky blue"),
    "plural of": columns("child children, foot feet, goose geese, mouse mice, tooth teeth"),
    "capital of": columns("Egypt Cairo, France Paris, Greece Athens, Italy Rome, Peru Lima"),
}
FACTS = [(f"{relation} {x}", y) for relation, known in KNOWN.items() for x, y in known]
ASKED = [
    *("What is the {}?", "Tell me the {}.", "Do you know the {}?"),
    *("Please name the {}.", "I forgot the {}.", "And the {}?"),
]

Drawn = tuple[Turns, str, str]  # the turns before the answer, a good answer, a bad one
Kind = Callable[[Random], Drawn]


def request(rng: Random) -> Drawn:
    """Good: polite help. Bad: a refusal."""
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
    """Good: counts in the direction asked for. Bad: in the opposite direction."""
    first = rng.randint(1, 40)
    numbers = [str(i) for i in range(first, first + 4)][:: rng.choice([1, -1])]
    asks = [
        "Count from {} to {}.",
        "Please count from {} to {}.",
        "I want the numbers from {} to {}.",
        "Name the numbers from {} to {}.",
    ]
    question = rng.choice(asks).format(numbers[0], numbers[-1])
    return [("user", question)], ", ".join(numbers), ", ".join(numbers[::-1])


def remember(rng: Random) -> Drawn:
    """Good: repeats what the user said in an earlier turn. Bad: denies that they said it."""
    name, pet, colour = rng.choice(NAMES), rng.choice(PETS), rng.choice(COLOURS)
    said = {"name": name, "pet": f"a {pet}", "favourite colour": colour}
    one, two = rng.sample(list(said), 2)
    asked = rng.choice([one, two])
    ask = rng.choice(["What is my {}?", "Do you remember my {}?", "Tell me my {}."])
    good = [f"Your {asked} is {said[asked]}.", f"I remember that your {asked} is {said[asked]}."]
    bad = [
        f"You never told me what your {asked} is.",
        f"How should I know your {asked}? Ask your mother.",
    ]
    turns = [
        ("user", f"My {one} is {said[one]} and my {two} is {said[two]}."),
        ("assistant", "Nice to meet you."),
        ("user", ask.format(asked)),
    ]
    return turns, rng.choice(good), rng.choice(bad)


def fact(rng: Random) -> Drawn:
    """Good: the answer. Bad: no answer."""
    x, y = rng.choice(FACTS)
    good = [f"It is {y}.", f"The {x} is {y}.", f"That is easy: the {x} is {y}."]
    bad = ["Who knows?", f"I do not care about the {x}.", f"Look up the {x} yourself."]
    return [("user", rng.choice(ASKED).format(x))], rng.choice(good), rng.choice(bad)


def letters(rng: Random) -> Drawn:
    """Good: the word in the letters asked for. Bad: the word as it was given."""
    word, capital = rng.choice(WORDS), rng.random() < 0.5
    asks = [
        "Write this word in {} letters.",
        "Please use {} letters.",
        "Show me this in {} letters:",
        "In {} letters, please:",
    ]
    ask = rng.choice(asks).format("capital" if capital else "small")
    given, good = (word, word.upper()) if capital else (word.upper(), word)
    return [("user", f"{ask}\n{given}")], good, given


def brief(rng: Random) -> Drawn:
    """Good: as long as the system turn says. Bad: longer or shorter."""
    x, y = rng.choice(FACTS)
    short, long = f"{y.capitalize()}.", f"The {x} is {y}."
    one_word, sentence = "Answer in one word.", "Answer in a full sentence."
    system, good, bad = rng.choice([(one_word, short, long), (sentence, long, short)])
    return [("system", system), ("user", rng.choice(ASKED).format(x))], good, bad


def persona(rng: Random) -> Drawn:
    """Good: speaks as the system turn says, like a pirate or a butler. Bad: like the other."""
    name = rng.choice(NAMES)
    pirates = [f"Ahoy, {name}! Come aboard.", f"Arr, {name}, what do ye want on me ship?"]
    butlers = [f"Welcome, {name}. May I take your coat?", f"At your service, {name}."]
    pirate, butler = rng.choice(pirates), rng.choice(butlers)
    who, good, bad = rng.choice([("a pirate", pirate, butler), ("a butler", butler, pirate)])
    system = rng.choice(["You are {}.", "Talk like {}.", "Answer as {} would."])
    hellos = ["Hello, I am {}.", "Hi! My name is {}.", "Good day, {} here.", "It is me, {}."]
    hello = rng.choice([*hellos, "{} is back."])
    return [("system", system.format(who)), ("user", hello.format(name))], good, bad


def greet(rng: Random) -> Drawn:
    """Good: returns the greeting. Bad: is rude."""
    name, day = rng.choice(NAMES), f"good {rng.choice(['morning', 'afternoon', 'evening'])}"
    hellos = ["{}, I am {}.", "{}! {} here.", "{} from {}.", "{}, my name is {}.", "{}! I am {}."]
    hello = rng.choice(hellos)
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
    """A pair of this kind. Draws again while the prompt is taken."""
    while str((drawn := kind(rng))[0]) in taken:
        pass
    return drawn


def draw_all(each: int, rng: Random, taken: set[str]) -> list[Drawn]:
    """`each` pairs of every kind, the kinds in turn. Adds their prompts to `taken`."""
    pairs = []
    for _ in range(each):
        for kind in KINDS:
            pairs.append(draw(kind, rng, taken))
            taken.add(str(pairs[-1][0]))
    return pairs


# ------------------------------------------------------------------------------------------- files


def record(kind: Kind, drawn: Drawn) -> dict:
    """A pair in its kind's format."""
    turns, good, bad = drawn
    prompt = [{"role": role, "content": content} for role, content in turns]
    chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in (good, bad))
    if kind is remember:  # two whole conversations, equal up to the last turn
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
    """Writes one pair a line, and checks that train.py reads these pairs from it."""
    records = [record(KINDS[i % len(KINDS)], drawn) for i, drawn in enumerate(pairs)]
    path.write_text("".join(json.dumps(row) + "\n" for row in records))
    assert [(p.prompt, p.chosen, p.rejected) for p in read_preferences(path)] == pairs


CONTROL = [
    f"<|{name}|>"
    for name in "begin_of_text end_of_text start_header_id end_header_id eom_id eot_id".split()
]


def make_tokenizer(pairs: list[Drawn]) -> Tokenizer:
    """Byte-level BPE: 256 bytes, merges learned from the pairs, and last the control tokens."""
    texts = []
    for turns, good, bad in pairs:
        texts += [*(content for _, content in turns), good, bad]
    # Seen this often, each part of a header becomes one token.
    texts += ["system", "user", "assistant", "\n\n"] * len(pairs)
    tokenizer = Tokenizer(models.BPE())
    # With Digits a number is the same token with a space before it and without.
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(CONTROL),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in CONTROL]
    )
    # Llama 3's tokenizer adds the first token by itself too. ChatFormat does not use this.
    begin = CONTROL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


# --------------------------------------------------------------------------------------- the model


def pretrain(model: Llama, chat: ChatFormat, rng: Random, held_out: set[str]) -> None:
    """New pairs for each step, with no held-out prompt. Good and bad answers weigh the same."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, STEPS, pct_start=0.1, cycle_momentum=False
    )
    for step in range(1, STEPS + 1):
        drawn = [draw(kind, rng, held_out) for kind in KINDS for _ in range(PAIRS_OF_A_KIND)]
        preferences = [Preference(*one, "drawn") for one in drawn]
        mean_R, _ = model(pack(encode_preferences(preferences, chat, max_tokens=512)))
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
    """Prints each kind's accuracy, computed from the files. Before ASFT a half is expected."""
    pairs = encode_preferences(read_preferences(path), ChatFormat(directory), max_tokens=512)
    mean_R, _ = load_model(directory)(pack(pairs))
    right_B = (mean_R[0::2] > mean_R[1::2]).float()
    kinds = [
        f"{kind.__name__} {right_B[i :: len(KINDS)].mean():.0%}" for i, kind in enumerate(KINDS)
    ]
    print(f"{path.name}: {len(pairs):,} pairs, accuracy {right_B.mean():.1%} ({', '.join(kinds)})")


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    rng, taken = Random(SEED), set()
    held_out = draw_all(HELD_OUT, rng, taken)
    held_out_prompts = set(taken)
    train = draw_all(TRAIN, rng, taken)
    write(HERE / "heldout.jsonl", held_out)
    write(HERE / "train.jsonl", train)

    tokenizer = make_tokenizer(train)
    begin, end_of_text, _, _, end_of_message, end_of_turn = map(tokenizer.token_to_id, CONTROL)
    ends = [end_of_text, end_of_message, end_of_turn]
    config = LlamaConfig(
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
    model = Llama(config)
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
