"""The words of the quickstart's preference set, all written for it: subjects, facts, sentences, ways of asking.

Plain data and no logic; `skills.py` combines them into prompts and answers. Kept to ASCII, so the foreign
sentences were chosen among those that need no accents.
"""

from __future__ import annotations

OPENERS = ("", "Hi! ", "Hello there. ", "Quick question: ", "Good morning. ", "Excuse me. ")
CLOSERS = ("", " Thanks!", " Thank you.", " I would be grateful.", " No hurry.")

# subject -> answers that fit only this subject
TOPICS: dict[str, tuple[str, ...]] = {
    "bread": ("Let the bread dough rise for a whole night.", "Good bread needs a very hot oven."),
    "chess": ("In chess, keep the king safe and bring out the knights.", "Play slow games of chess and study the endings."),
    "tomatoes": ("Tomatoes want full sun and water at the roots.", "Plant tomatoes deep and tie the stems to a stake."),
    "guitar": ("Learn four guitar chords and strum them slowly.", "Tune every guitar string before you play."),
    "photographs": ("For good photographs, watch where the light falls.", "Photographs gain when the camera is held still."),
    "knitting": ("Begin knitting with thick wool and a plain scarf.", "In knitting, count the stitches of each row."),
    "swimming": ("Begin swimming in the shallow end of the pool.", "While swimming, breathe out under water."),
    "bicycles": ("Bicycles need a little oil on the chain.", "Pump up the tyres of bicycles every week."),
    "coffee": ("Grind coffee beans just before you brew.", "Pour the water over the coffee in slow circles."),
    "bees": ("Place the bees where the morning sun warms the hive.", "Leave the bees enough honey for the winter."),
}
TOPIC_QUESTIONS = (
    "Do you have any advice about {}?",
    "My new hobby is {}. Any tips?",
    "What should a beginner know about {}?",
    "Could you tell me something about {}?",
    "I like {}. What can I learn?",
    "A friend asked me about {}. What should I say?",
)

# family of facts -> (ways of asking, ways of answering, asked -> answer)
FACTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], dict[str, str]]] = {
    "capital": (
        ("What is the capital of {}?", "Which city is the seat of government of {}?", "Name the capital city of {}."),
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
        ("What do you call a young {}?", "What is the name for a baby {}?", "Which word means a very young {}?"),
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
        ("What is the opposite of {}?", "Which word means the reverse of {}?", "Give me the antonym of {}."),
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
        "On se voit lundi matin.",
        "Wir sehen uns am Montag.",
        "Nos vemos el lunes.",
        "Ci vediamo domani sera.",
        "Wij zien elkaar op maandag.",
    ),
    "How do you say goodbye?": (
        "Au revoir et bonne nuit.",
        "Auf Wiedersehen und gute Nacht.",
        "Hasta luego y buenas noches.",
        "Arrivederci e buona notte.",
        "Tot ziens en goede nacht.",
    ),
    "What did you eat?": (
        "Du pain avec du fromage.",
        "Ich habe Brot und Suppe gegessen.",
        "Pan con queso y una sopa.",
        "Ho mangiato pane e formaggio.",
        "Ik heb brood met kaas gegeten.",
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

# mood of the user -> (what happened, fitting replies)
MOODS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "joy": (
        (
            "I passed my driving test",
            "my sister had a baby",
            "I got the job",
            "we won the final",
            "I finished my novel",
            "my team won a prize",
            "I was given a scholarship",
            "we bought our first house",
        ),
        (
            "Congratulations! You must be so proud.",
            "Wonderful news! That calls for a celebration.",
            "How marvellous! I am delighted for you.",
            "Hooray! Well done indeed.",
        ),
    ),
    "sorrow": (
        (
            "my old dog died",
            "I lost my job",
            "I failed the exam",
            "my bicycle was stolen",
            "we missed the last train",
            "my best friend moved away",
            "I broke my arm",
            "our garden was flooded",
        ),
        (
            "I am sorry to hear that. It must be hard.",
            "Oh no, how sad. Please be kind to yourself.",
            "My sympathy. That is a heavy thing to carry.",
            "That sounds painful. I wish I could help.",
        ),
    ),
    "worry": (
        (
            "I have an exam tomorrow",
            "I must give a speech",
            "I have to see the dentist",
            "I am afraid of flying",
            "I start a new school on Monday",
            "my interview is in an hour",
            "I am nervous about the concert",
            "I cannot sleep before the race",
        ),
        (
            "Take a deep breath. You are well prepared.",
            "Stay calm. It will go better than you fear.",
            "Nerves are normal. One step at a time.",
            "Do not worry. You can manage this.",
        ),
    ),
}
MOOD_LEADS = (
    "Guess what: {}.",
    "You know, {}.",
    "Today I have to tell you that {}.",
    "I just wanted to say that {}.",
    "Listen, {}.",
    "Well, {}.",
)
MOOD_ENDS = ("", " I had to tell somebody.", " You are the first to hear it.", " What do you say?")

# what the user tells -> (ways of telling, replies, ways of asking later, ways of answering, values)
MEMORIES: dict[str, tuple[tuple[str, ...], ...]] = {
    "name": (
        ("My name is {}.", "I am called {}.", "Please call me {}."),
        ("Nice to meet you, {}.", "Welcome, {}.", "How do you do, {}?"),
        ("What is my name?", "Do you remember my name?", "Who am I?"),
        ("Your name is {}.", "You are {}.", "You said {}."),
        ("Nora", "Omar", "Lena", "Felix", "Grace", "Hugo", "Ivy", "Peter"),
    ),
    "home": (
        ("I live in {}.", "My home is in {}.", "I come from {}."),
        ("I hear that {} is lovely.", "What a fine place {} is!", "Greetings to {}."),
        ("Where do I live?", "Do you remember my city?", "Which town is mine?"),
        ("You live in {}.", "Your city is {}.", "You said {}."),
        ("Lisbon", "Dublin", "Vienna", "Boston", "Prague", "Toronto", "Geneva", "Naples"),
    ),
    "allergy": (
        ("I am allergic to {}.", "I cannot eat {}.", "I must avoid {}."),
        ("Then no {} for you.", "I will leave out the {}.", "Understood, nothing with {}."),
        ("Which food must I avoid?", "What am I allergic to?", "What can I not eat?"),
        ("You must avoid {}.", "You cannot eat {}.", "You said {}."),
        ("nuts", "eggs", "shrimp", "celery", "mustard", "sesame", "garlic", "cheese"),
    ),
}
ACKNOWLEDGEMENTS = ("Good to know.", "Thank you for telling me.", "I will keep that in mind.", "Noted.")

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
BOOKINGS: dict[str, str] = {
    "a table for two": "Your table is booked for {}.",
    "a visit to the dentist": "Your visit is set for {}.",
    "a haircut": "Your haircut is on {}.",
    "a taxi to the station": "Your taxi will come on {}.",
    "a piano lesson": "Your lesson is on {}.",
    "a boat trip": "Your boat leaves on {}.",
}
CHANGES = ("Sorry, make it {} instead.", "Oh, I meant {}.", "Could we move it to {}?", "Actually, {} suits me better.")

HOBBIES = ("cooking", "dancing", "singing", "painting", "fishing", "hiking", "sewing", "rowing")
SHORT_ADVICE = ("Start small and be patient.", "Practise a little every day.", "Ask somebody who knows.",
                "Enjoy it and take your time.", "Begin with the easy parts.", "Find a good teacher.")

# persona -> (ways of asking for it in the system turn, openings, endings)
PERSONAS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "pirate": (
        ("You are a pirate.", "Talk like a pirate.", "Answer as an old pirate would."),
        ("Arr, matey!", "Ahoy, ye landlubber!"),
        ("Yo ho!", "Shiver me timbers!"),
    ),
    "butler": (
        ("You are a butler.", "Talk like a butler.", "Answer as a polite butler would."),
        ("Very good, sir.", "At your service, sir."),
        ("Will that be all, sir?", "Your humble servant."),
    ),
    "robot": (
        ("You are a robot.", "Talk like a robot.", "Answer as a simple robot would."),
        ("Beep. Query received.", "Bzzt. Computing."),
        ("End of output.", "Beep boop."),
    ),
    "coach": (
        ("You are a sports coach.", "Talk like a coach.", "Answer as a loud coach would."),
        ("Come on, champ!", "Let's go, team!"),
        ("Give me ten more!", "No pain, no gain!"),
    ),
    "grandmother": (
        ("You are a kind grandmother.", "Talk like a grandmother.", "Answer as a warm grandmother would."),
        ("Oh, my dear.", "Sit down, sweetheart."),
        ("Now have a biscuit.", "Bless you, darling."),
    ),
}
