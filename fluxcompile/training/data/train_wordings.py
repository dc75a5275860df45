"""Wordings of the training prompts. The held-out ones share no line with these."""

from fluxcompile.training.data.wordings import Chain, Fact, Wordings, listed

WORDINGS = Wordings(
    openings=(
        "Read the following text.",
        "Here is a document.",
        "Below is a long excerpt.",
        "Use this text to answer.",
        "Consider this excerpt.",
        "I am pasting a long text.",
        "Context:",
        "You are given some notes and sources.",
        "What follows was copied from several files.",
        "Look through the file.",
        "The text:",
        "Here is everything we have on record.",
    ),
    ask_first=(
        "{question} The answer is in the text below.",
        "While you read, look for this: {question}",
        "Question: {question}",
        "I need to know this. {question}",
        "You will be asked: {question}",
        "Find out: {question}",
        "{question} Search the document for it.",
        "My question about what comes next is: {question}",
        "Q: {question}",
    ),
    ask_last=(
        "{question}",
        "Now answer: {question}",
        "Question about the text above: {question}",
        "Q: {question}",
        "According to the document, {question}",
        "My question: {question}",
        "Using only what you have read, answer this: {question}",
        "{question} Look it up in the text.",
        "I forgot one detail. {question}",
        "Can you find this for me? {question}",
    ),
    brief=(
        "Give only the answer.",
        "Answer with the value alone.",
        "Answer briefly.",
        "Just the value.",
        "Keep it short.",
        "Do not add anything.",
        "One line is enough.",
        "Write the exact value.",
    ),
    cues=("Answer:", "Answer:", "A:", "Response:", "The answer:", "Assistant:"),
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
        Fact(
            "Remember that the door of the {key} hotel has the combination {value}.",
            "Which combination has the door of the {key} hotel?",
            "The door of the {key} hotel has the combination",
        ),
        Fact(
            "Customer service for {key} is reached at extension {value}.",
            "At which extension is customer service for {key} reached?",
            "Customer service for {key} is reached at extension",
        ),
        Fact(
            "The special identifier of {key} is {value}.",
            "What is the special identifier of {key}?",
            "The special identifier of {key} is",
        ),
        Fact(
            "By decree, every lamp in {key} bears the stamp {value}.",
            "Which stamp does every lamp in {key} bear?",
            "Every lamp in {key} bears the stamp",
        ),
        Fact(
            "The meter in {key} showed a reading of {value}.",
            "What reading did the meter in {key} show?",
            "The meter in {key} showed a reading of",
        ),
        Fact(
            "The pin that unlocks the {key} archive is {value}.",
            "What pin unlocks the {key} archive?",
            "The pin that unlocks the {key} archive is",
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
        Fact(
            "A letter from {key} has the reference {value}.",
            "Which reference has the letter from {key}?",
            "The letter from {key} has the reference",
        ),
        Fact(
            "The elevator made in {key} is model {value}.",
            "Which model is the elevator made in {key}?",
            "The elevator made in {key} is model",
        ),
        Fact(
            "The report about {key} is kept in folder {value}.",
            "In which folder is the report about {key} kept?",
            "The report about {key} is kept in folder",
        ),
        Fact(
            "Our contract with {key} is number {value}.",
            "What number is our contract with {key}?",
            "Our contract with {key} is number",
        ),
    ),
    # A lead that repeats the line up to its value is how a small model looks a value up.
    records=(
        Fact('"{key}": {value},', 'What is the value of the key "{key}"?', '"{key}":'),
        Fact("{key} = {value}", "To what is {key} set?", "{key} ="),
        Fact("{key}: {value}", "Which value is listed for {key}?", "{key}:"),
        Fact("| {key} | {value} |", "What does the table say in the row {key}?", "| {key} |"),
        Fact("{key} -> {value}", "To what does {key} map?", "{key} ->"),
        Fact("<{key}>{value}</{key}>", "What stands in the element {key}?", "<{key}>"),
        Fact("- {key}: {value}", "What is noted under {key}?", "- {key}:"),
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
        Chain(
            "{a} shares a room with {b}.",
            "{b}'s badge has the number {value}.",
            "What number is on the badge of {a}'s roommate?",
            "The badge of {a}'s roommate has the number",
        ),
        Chain(
            "{a} sold the boat to {b}.",
            "The boat of {b} is licensed as {value}.",
            "As what is the boat that {a} sold licensed?",
            "The boat that {a} sold is licensed as",
        ),
    ),
    continue_code=(
        "Continue this Python module.",
        "Write the next lines of this code.",
        "This file breaks off. Complete it.",
        "Extend the code.",
        "What code comes after this?",
        "Keep coding in the same style.",
        "Implement the rest of the module.",
        "The source below is cut. Add what is missing.",
        "Go on programming.",
    ),
    continue_prose=(
        "Continue this text.",
        "Write what comes next in this manual.",
        "This page breaks off. Complete it.",
        "Extend the document.",
        "What paragraph comes after this?",
        "Keep writing in the same tone.",
        "Summarize the text in your own words.",
        "Explain further what the text is about.",
        "Go on with the explanation.",
    ),
    sort=(
        "Each excerpt comes from one of these modules: {names}. Name the module of the last one.",
        "The excerpts are from {names}. From which of these is the last excerpt?",
        "Classify each piece of code as one of {names}.",
        "Label the code. Possible labels: {names}.",
        "Given examples from {names}, say where the last one is from.",
    ),
    shot=(
        "Excerpt:\n{text}\nModule: {name}",
        "Code:\n{text}\nIt is from: {name}",
        "Input:\n{text}\nLabel: {name}",
        "{text}\nFile: {name}",
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
    values=("##", "#####", "###-####", "@@##", "@#@#", "@@#", "* ##", "*-##"),
    record_keys=("*_##", "*_*"),
    fillers=("prose", "prose", "code", "mixed"),
)
