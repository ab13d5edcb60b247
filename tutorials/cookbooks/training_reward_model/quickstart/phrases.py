"""The words of the quickstart's preference set, all written for it: what one question needs.

Plain data and no logic; `skills.py` combines these and the words of `dialogues.py` into prompts and answers.
Kept to ASCII, so the foreign sentences were chosen among those that need no accents.
"""

from __future__ import annotations

GREETINGS = ("", "Hi! ", "Hello there. ", "Good morning. ", "Good evening. ", "Good day. ")
OPENERS = (*GREETINGS, "Quick question: ", "Excuse me. ")
CLOSERS = ("", " Thanks!", " Thank you.", " I would be grateful.", " No hurry.")

# subject -> answers that fit only this subject
TOPICS: dict[str, tuple[str, ...]] = {
    "bread": ("Let the bread dough rise for a whole night.", "Good bread needs a very hot oven."),
    "chess": ("In chess, keep the king safe.", "Play slow games and study chess endings."),
    "tomatoes": ("Tomatoes want full sun and water at the roots.", "Plant tomatoes deep and tie the stems to a stake."),
    "guitar": ("Learn four guitar chords and strum them slowly.", "Tune every guitar string before you play."),
    "photographs": ("Good photographs need soft light.", "Hold the camera still for sharp photographs."),
    "knitting": ("Begin knitting with thick wool and a plain scarf.", "In knitting, count the stitches of each row."),
    "swimming": ("Begin swimming in the shallow end of the pool.", "While swimming, breathe out under water."),
    "bicycles": ("Bicycles need a little oil on the chain.", "Pump up the tyres of bicycles every week."),
    "coffee": ("Grind coffee beans just before you brew.", "Pour the water over the coffee in slow circles."),
    "bees": ("Place the bees where the morning sun warms the hive.", "Leave the bees enough honey for the winter."),
}
TOPIC_QUESTIONS = (
    "Do you have any advice about {}?",
    "Any tips about {} for me?",
    "What should a beginner know about {}?",
    "Could you tell me something about {}?",
    "What can I learn about {}?",
    "What should I tell a friend about {}?",
    "Can you give me a hint about {}?",
    "Where do I begin with {}?",
)

# family of facts -> (ways of asking, ways of answering, asked -> answer)
FACTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], dict[str, str]]] = {
    "capital": (
        (
            "What is the capital of {}?",
            "Which city is the capital of {}?",
            "Name the capital city of {}.",
            "Can you tell me the capital of {}?",
        ),
        ("It is {}.", "The capital is {}.", "That would be {}."),
        {
            "France": "Paris",
            "Italy": "Rome",
            "Spain": "Madrid",
            "Japan": "Tokyo",
            "Egypt": "Cairo",
            "Kenya": "Nairobi",
            "Peru": "Lima",
            "Norway": "Oslo",
            "Greece": "Athens",
            "Cuba": "Havana",
        },
    ),
    "young": (
        (
            "What do you call a young {}?",
            "What is the name for a baby {}?",
            "Which word means a young {}?",
            "Can you tell me the word for a baby {}?",
        ),
        ("It is called a {}.", "The word is {}.", "People say {}."),
        {
            "dog": "puppy",
            "cat": "kitten",
            "cow": "calf",
            "horse": "foal",
            "sheep": "lamb",
            "duck": "duckling",
            "goat": "kid",
            "bear": "cub",
            "deer": "fawn",
            "frog": "tadpole",
        },
    ),
    "opposite": (
        (
            "What is the opposite of {}?",
            "Which word is the opposite of {}?",
            "Name the opposite of {}.",
            "Can you tell me the opposite of {}?",
        ),
        ("The opposite is {}.", "The word is {}.", "That would be {}."),
        {
            "hot": "cold",
            "early": "late",
            "heavy": "light",
            "full": "empty",
            "loud": "quiet",
            "rich": "poor",
            "fast": "slow",
            "wet": "dry",
            "brave": "timid",
            "narrow": "wide",
        },
    ),
}

# small talk, and its answer in every language asked for
LANGUAGES = ("French", "German", "Spanish", "Italian", "Dutch")
SMALL_TALK: dict[str, tuple[str, str, str, str, str]] = {
    "How are you today?": (
        "Je vais bien, merci beaucoup.",
        "Mir geht es gut, vielen Dank.",
        "Estoy bien, muchas gracias.",
        "Sto bene, grazie mille.",
        "Het gaat goed met mij, dank je wel.",
    ),
    "What do you like to drink?": (
        "Je bois du lait et de l'eau.",
        "Ich trinke gern Milch und Wasser.",
        "Me gusta beber leche y agua.",
        "Mi piace bere latte e acqua.",
        "Ik drink graag melk en water.",
    ),
    "Which animals do you like?": (
        "J'aime les chiens et les chats.",
        "Ich mag Hunde und Katzen.",
        "Me gustan los perros y los gatos.",
        "Mi piacciono i cani e i gatti.",
        "Ik hou van honden en katten.",
    ),
    "What is the weather like?": (
        "Il fait beau, le soleil brille.",
        "Das Wetter ist gut, die Sonne scheint.",
        "Hace buen tiempo y brilla el sol.",
        "Fa bel tempo e il sole splende.",
        "Het is mooi weer en de zon schijnt.",
    ),
    "What are you reading?": (
        "Je lis un bon livre.",
        "Ich lese ein gutes Buch.",
        "Leo un buen libro.",
        "Leggo un buon libro.",
        "Ik lees een goed boek.",
    ),
    "When will we meet?": (
        "On se voit dimanche.",
        "Wir sehen uns am Sonntag.",
        "Nos vemos el domingo.",
        "Ci vediamo domenica.",
        "Wij zien elkaar op zondag.",
    ),
    "How do you say goodbye?": (
        "Au revoir et bonne nuit.",
        "Auf Wiedersehen und gute Nacht.",
        "Hasta luego y buenas noches.",
        "Arrivederci e buona notte.",
        "Tot ziens en goede nacht.",
    ),
    "What did you eat?": (
        "Du pain et de la soupe.",
        "Brot und Suppe.",
        "Pan y sopa.",
        "Pane e zuppa.",
        "Brood en soep.",
    ),
}
LANGUAGE_REQUESTS = (
    "Please answer in {}.",
    "Reply in {}, please.",
    "I am learning {}, so use that language.",
    "Say it in {}.",
    "Your answer should be in {}.",
)

THINGS: dict[str, tuple[str, str, str]] = {
    "fruits": ("apples", "pears", "plums"),
    "trees": ("oak", "birch", "pine"),
    "colours": ("red", "green", "blue"),
    "metals": ("iron", "copper", "silver"),
    "drinks": ("tea", "milk", "juice"),
    "seasons": ("spring", "summer", "winter"),
    "planets": ("Venus", "Mars", "Saturn"),
    "rivers": ("Nile", "Rhine", "Danube"),
    "spices": ("ginger", "pepper", "mint"),
    "tools": ("hammer", "saw", "drill"),
    "flowers": ("rose", "tulip", "daisy"),
    "shapes": ("circle", "square", "cube"),
}
THING_REQUESTS = ("Name three {}.", "Give me three {}.", "Can you tell me three {}?", "I need three {} for a quiz.")
FORMATS: dict[str, tuple[str, str, str]] = {
    "bullets": ("Use a bulleted list.", "Put each one behind a bullet.", "Format it with bullets."),
    "numbers": ("Use a numbered list.", "Number the items.", "Format it with numbers."),
    "capitals": ("Use capital letters.", "Write it all in capitals.", "Format it in capitals."),
    "sentence": ("Use a full sentence.", "Write one whole sentence.", "Format it as a sentence."),
    "commas": ("Use nothing but commas.", "Separate them by commas.", "Format it with commas alone."),
}
