"""Wordings of the held-out prompts: other sentences, other names, values in words or letters."""

from fluxcompile.training.data.wordings import Chain, Fact, Wordings, listed

WORDINGS = Wordings(
    openings=(
        "Study what is written here.",
        "Please go through these pages.",
        "The material follows.",
    ),
    ask_first=(
        "Somewhere in these pages it says: {question}",
        "Keep one thing in mind as you go: {question}",
    ),
    ask_last=(
        "So: {question}",
        "Tell me, going by the pages above: {question}",
    ),
    brief=(
        "Reply with nothing else.",
        "No explanation, please.",
    ),
    cue="Reply:",
    needle=(
        Fact(
            "Visitors of the {key} museum must say the password {value}.",
            "Which password must visitors of the {key} museum say?",
            "Visitors of the {key} museum must say the password",
        ),
        Fact(
            "The guards at {key} chose the watchword {value}.",
            "Which watchword did the guards at {key} choose?",
            "The guards at {key} chose the watchword",
        ),
        Fact(
            "Sailors call the lighthouse near {key} by the name {value}.",
            "By which name do sailors call the lighthouse near {key}?",
            "Sailors call the lighthouse near {key} by the name",
        ),
    ),
    needles=(
        Fact(
            "The choir from {key} sings under the title {value}.",
            "Under which title does the choir from {key} sing?",
            "The choir from {key} sings under the title",
            "Name the titles of every choir as they appear.",
        ),
        Fact(
            "The ferry for {key} was christened {value}.",
            "What was the ferry for {key} christened?",
            "The ferry for {key} was christened",
            "Name every ferry as they appear.",
        ),
    ),
    records=(
        Fact("{key} => {value}", "What does {key} map onto?", "{key} =>"),
        Fact("entry {key} holds {value};", "What does the entry {key} hold?", "entry {key} holds"),
    ),
    chains=(
        Chain(
            "{a} is married to {b}.",
            "{b} owns a boat called {value}.",
            "How is the boat called that the spouse of {a} owns?",
            "The spouse of {a} owns a boat called",
        ),
        Chain(
            "{a} learned the trade from {b}.",
            "The workshop of {b} is known as {value}.",
            "As what is the workshop of the teacher of {a} known?",
            "The workshop of the teacher of {a} is known as",
        ),
    ),
    continue_code=(
        "Carry on with the source from where it stops.",
        "Please finish the program above or below.",
    ),
    continue_prose=(
        "Carry on with the passage from where it stops.",
        "Please finish the chapter.",
    ),
    sort=("Sources: {names}. Which one does the final snippet belong to?",),
    shot=("Snippet:\n{text}\nSource: {name}",),
    places=listed(
        "Aberdeen Adelaide Antwerp Bergen Bilbao Bologna Bremen Bristol Cardiff Cologne Cordoba "
        "Dresden Edinburgh Florence Galway Genoa Glasgow Graz Halifax Hobart Innsbruck Krakow "
        "Leipzig Lille Lisbon Ljubljana Lyon Malmo Marseille Naples Odessa Palermo Porto Quebec "
        "Reykjavik Riga Rotterdam Salzburg Seville Stuttgart Toledo Tallinn Turin Utrecht "
        "Valencia Venice Vilnius Zagreb"
    ),
    people=listed(
        "Agnes Albert Amelia Arthur Beatrice Bernard Bruno Cecilia Charlotte Conrad Dorothy Edgar "
        "Edith Elias Esther Eugene Florian Gloria Gustav Harriet Hector Helga Hugo Ingrid Irene "
        "Jasper Josephine Klara Lambert Leopold Louisa Magnus Mathilda Maurice Nathan Olga Otto "
        "Philippa Quentin Ralph Rebecca Rupert Sigrid Theodor Ursula Vera Winston Yvonne"
    ),
    words=listed(
        "acorn amber anchor badger beacon birch blossom canyon cedar cinder cobalt comet copper "
        "coral crimson crystal dagger dolphin eagle ember emerald falcon feather fern flint "
        "fossil frost galaxy glacier granite harbor hazel heron hollow indigo ivory jasmine "
        "jasper juniper kettle lantern lavender lily lotus maple marble meadow meteor mint mist "
        "nectar nutmeg oak onyx orchid otter owl pearl pebble pepper pine plum poppy quartz raven "
        "reef ripple ruby saffron sage scarlet shadow silver sparrow spruce thistle thunder tiger "
        "timber topaz tulip velvet violet walnut willow wolf zephyr"
    ),
    values=("* *", "*-*", "@@@@@"),
    record_keys=("* *", "*.*"),
    fillers=("mixed", "code", "prose", "mixed"),
)
