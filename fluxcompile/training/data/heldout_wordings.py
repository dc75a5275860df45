"""Wordings of the held-out prompts: other sentences, other names, other forms of values.

They were chosen so that a small model (SmolLM2-135M) with full attention answers them: a share of
what full attention finds says little where it finds little. That selects for prompts that can be
answered, not for any way of routing; no router and no sparse pattern was looked at, but for the
lengths of values. Figures are taken with other seeds than those that wordings were chosen with.

No value has a digit, as all of training's have. Half of their forms are short, half take three to
five tokens: answers of one or two, of which hardly anything is decoded, every pattern keeps.
"""

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
    cues=("Reply:",),
    needle=(
        Fact(
            "Visitors of the {key} museum must say the password {value}.",
            "Which password must visitors of the {key} museum say?",
            "Visitors of the {key} museum must say the password",
        ),
        Fact(
            "The ship in the port of {key} is named {value}.",
            "What is the ship in the port of {key} named?",
            "The ship in the port of {key} is named",
        ),
        Fact(
            "Whoever wants to enter the secret garden of {key} has to say {value}.",
            "What has to say whoever wants to enter the secret garden of {key}?",
            "Whoever wants to enter the secret garden of {key} has to say",
        ),
        Fact(
            "Guests of the royal hotel in {key} are asked for the password {value}.",
            "For which password are guests of the royal hotel in {key} asked?",
            "Guests of the royal hotel in {key} are asked for the password",
        ),
    ),
    needles=(
        Fact(
            "The bakery in {key} sells the brand {value}.",
            "Which brand does the bakery in {key} sell?",
            "The bakery in {key} sells the brand",
        ),
        Fact(
            "The theatre in {key} shows the play {value}.",
            "Which play does the theatre in {key} show?",
            "The theatre in {key} shows the play",
        ),
        Fact(
            "The ferry for {key} was christened {value}.",
            "What was the ferry for {key} christened?",
            "The ferry for {key} was christened",
        ),
        Fact(
            "The horse from {key} is named {value}.",
            "What is the horse from {key} named?",
            "The horse from {key} is named",
        ),
    ),
    records=(
        Fact(
            "{key}: the {key} label reads {value}.",
            "What does the {key} label read?",
            "{key}: the {key} label reads",
        ),
        Fact(
            "When the panel shows {key}, the operator answers with {value}.",
            "With what does the operator answer when the panel shows {key}?",
            "When the panel shows {key}, the operator answers with",
        ),
        Fact(
            "The {key} team has chosen as its mascot the {value}.",
            "Which mascot has the {key} team chosen?",
            "The {key} team has chosen as its mascot the",
        ),
        Fact(
            "{key}: see under {key}, page {value};",
            "Which page is to be seen under {key}?",
            "{key}: see under {key}, page",
        ),
    ),
    chains=(
        Chain(
            "{a} plays chess against {b}.",
            "The opponent {b} wears the badge {value}.",
            "Which badge does the opponent of {a} wear?",
            "The opponent of {a} wears the badge",
        ),
        Chain(
            "{a} is travelling with {b}.",
            "The suitcase of {b} is labelled {value}.",
            "How is the suitcase of the companion of {a} labelled?",
            "The suitcase of the companion of {a} is labelled",
        ),
        Chain(
            "{a} goes sailing with {b}.",
            "On the sail of the skipper {b} stands in large letters {value}.",
            "What stands on the sail of the skipper of {a}?",
            "On the sail of the skipper of {a} stands in large letters",
        ),
        Chain(
            "{a} had been painted by {b}.",
            "The painter {b} signs all of the portraits with {value}.",
            "With what does the painter of {a} sign all of the portraits?",
            "The painter of {a} signs all of the portraits with",
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
    values=("@@@", "*", "*-*", "@@@@@@"),
    record_keys=("*",),
    fillers=("mixed", "code", "prose", "mixed"),
)
