"""Wordings of the training prompts. The held-out ones share no line with these."""

from fluxcompile.training.data.wordings import Chain, Fact, Wordings, listed

WORDINGS = Wordings(
    openings=(
        "Read the following text.",
        "Here is a document.",
        "Below is a long excerpt.",
        "Use this text to answer.",
    ),
    ask_first=(
        "{question} The answer is in the text below.",
        "While you read, look for this: {question}",
        "Question: {question}",
    ),
    ask_last=(
        "{question}",
        "Now answer: {question}",
        "Question about the text above: {question}",
    ),
    brief=(
        "Give only the answer.",
        "Answer with the value alone.",
        "Answer briefly.",
    ),
    cue="Answer:",
    needle=(
        Fact(
            "The access code of the {key} office is {value}.",
            "What is the access code of the {key} office?",
            "The access code of the {key} office is",
        ),
        Fact(
            "Note: the lucky number for {key} is {value}.",
            "What is the lucky number for {key}?",
            "The lucky number for {key} is",
        ),
        Fact(
            "The parcel for {key} carries the number {value}.",
            "Which number does the parcel for {key} carry?",
            "The parcel for {key} carries the number",
        ),
        Fact(
            "In {key} the secret code is {value}.",
            "What is the secret code in {key}?",
            "In {key} the secret code is",
        ),
        Fact(
            "The ticket bought in {key} has the serial number {value}.",
            "What is the serial number of the ticket bought in {key}?",
            "The ticket bought in {key} has the serial number",
        ),
        Fact(
            "Our warehouse in {key} is registered as {value}.",
            "As what is our warehouse in {key} registered?",
            "Our warehouse in {key} is registered as",
        ),
    ),
    needles=(
        Fact(
            "The flight to {key} has the number {value}.",
            "What is the number of the flight to {key}?",
            "The flight to {key} has the number",
        ),
        Fact(
            "The magic number for {key} is {value}.",
            "What is the magic number for {key}?",
            "The magic number for {key} is",
        ),
        Fact(
            "The invoice from {key} is filed under {value}.",
            "Under what is the invoice from {key} filed?",
            "The invoice from {key} is filed under",
        ),
        Fact(
            "The safe in {key} opens with {value}.",
            "With what does the safe in {key} open?",
            "The safe in {key} opens with",
        ),
    ),
    # A lead that repeats the line up to its value is how a small model looks a value up.
    records=(
        Fact('"{key}": {value},', 'What is the value of the key "{key}"?', '"{key}":'),
        Fact("{key} = {value}", "To what is {key} set?", "{key} ="),
        Fact("{key}: {value}", "Which value is listed for {key}?", "{key}:"),
        Fact("| {key} | {value} |", "What does the table say in the row {key}?", "| {key} |"),
    ),
    chains=(
        Chain(
            "{a}'s best friend is {b}.",
            "{b}'s locker code is {value}.",
            "What is the locker code of {a}'s best friend?",
            "The locker code of {a}'s best friend is",
        ),
        Chain(
            "{a} works for {b}.",
            "The phone number of {b} is {value}.",
            "What is the phone number of the person {a} works for?",
            "The phone number of the person {a} works for is",
        ),
        Chain(
            "{a} lives next door to {b}.",
            "{b} drives the car with the plate {value}.",
            "What is the plate of the car driven by the neighbour of {a}?",
            "The neighbour of {a} drives the car with the plate",
        ),
    ),
    continue_code=(
        "Continue this Python module.",
        "Write the next lines of this code.",
        "This file breaks off. Complete it.",
    ),
    continue_prose=(
        "Continue this text.",
        "Write what comes next in this manual.",
        "This page breaks off. Complete it.",
    ),
    sort=(
        "Each excerpt comes from one of these modules: {names}. Name the module of the last one.",
        "The excerpts are from {names}. From which of these is the last excerpt?",
    ),
    shot=(
        "Excerpt:\n{text}\nModule: {name}",
        "Code:\n{text}\nIt is from: {name}",
    ),
    places=listed(
        "Amsterdam Athens Baghdad Bangkok Barcelona Beirut Berlin Bogota Boston Brussels Budapest "
        "Cairo Chicago Copenhagen Dakar Delhi Dublin Geneva Hamburg Havana Helsinki Istanbul "
        "Jakarta Karachi Kiev Lagos Lima London Madrid Manila Melbourne Milan Montreal Moscow "
        "Mumbai Munich Nairobi Oslo Paris Prague Quito Rome Santiago Seoul Sydney Tokyo Toronto "
        "Vienna"
    ),
    people=listed(
        "Alice Anna Ben Carla Carlos Clara Daniel David Diana Elena Emma Eric Eva Felix Frank "
        "Grace Hanna Henry Ida Ivan Jack James Julia Karl Kate Laura Leo Linda Lucas Maria Mark "
        "Martin Mia Nina Oliver Oscar Paul Peter Rosa Sarah Simon Sofia Thomas Tom Victor Walter"
    ),
    words=listed(
        "apple arrow basket beach bird book bottle bread bridge butter candle carpet chair cheese "
        "clock cloud coat coffee corner cup desk door engine field finger fish floor flower "
        "forest garden glass grass hand hat horse house island jacket kitchen knife ladder lake "
        "leaf letter market milk mirror moon mountain needle ocean orange paper pencil pillow "
        "plate pocket rain ring river road rock roof room salt shirt shoe snow soap spoon star "
        "stone street sugar summer table tower train tree wall water wheel window winter wood "
        "yard"
    ),
    values=("#####", "######", "###-####", "@@####"),
    record_keys=("*_##", "*_*"),
    fillers=("prose", "prose", "code", "mixed"),
)
