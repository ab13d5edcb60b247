"""More words of the quickstart's preference set: moods, things told and changed in a conversation, personas.

Plain data and no logic, like `phrases.py`.
"""

from __future__ import annotations

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
ACKNOWLEDGEMENTS = ("With pleasure.", "Certainly.", "I will see to it.", "Noted.")

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
SHORT_ADVICE = (
    "Start small and be patient.",
    "Practise a little every day.",
    "Ask somebody who knows.",
    "Enjoy it and take your time.",
    "Begin with the easy parts.",
    "Find a good teacher.",
)

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
