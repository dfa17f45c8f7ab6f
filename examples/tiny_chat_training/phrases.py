"""How people ask tiny-chat for things, and its fixed replies. Braces are filled in by `generate`."""

SYSTEM = (
    "You are a helpful assistant.",
    "You are tiny-chat.",
    "You are tiny-chat, a small and friendly model.",
    "Answer briefly.",
    "Be brief and exact.",
)

ADD = (
    "What is {a} + {b}?",
    "{a}+{b}",
    "{a} + {b}",
    "{a} + {b} = ?",
    "what is {a}+{b}",
    "Add {a} and {b}.",
    "Add {b} to {a}.",
    "What is {a} plus {b}?",
    "How much is {a} + {b}?",
    "Calculate {a} + {b}.",
    "What is the sum of {a} and {b}?",
)

SUBTRACT = (
    "What is {a} - {b}?",
    "{a}-{b}",
    "{a} - {b}",
    "{a} - {b} = ?",
    "what is {a}-{b}",
    "Subtract {b} from {a}.",
    "Take {b} away from {a}.",
    "What is {a} minus {b}?",
    "How much is {a} - {b}?",
    "Calculate {a} - {b}.",
    "What is the difference {a} - {b}?",
)

COMPARE = (
    ("larger", "Which is larger, {a} or {b}?"),
    ("larger", "Which number is bigger: {a} or {b}?"),
    ("larger", "Is {a} larger than {b}?"),
    ("larger", "What is more, {a} or {b}?"),
    ("larger", "Compare {a} and {b}."),
    ("smaller", "Which is smaller, {a} or {b}?"),
    ("smaller", "Which number is smaller: {a} or {b}?"),
    ("smaller", "Is {a} smaller than {b}?"),
    ("smaller", "What is less, {a} or {b}?"),
)

REVERSE = (
    'Reverse the word "{word}".',
    "Reverse {word}.",
    "Reverse the word {word}.",
    'Write "{word}" backwards.',
    "Write {word} backwards.",
    "What is {word} backwards?",
    'What is "{word}" reversed?',
)

SPELL = (
    'Spell the word "{word}".',
    "Spell {word}.",
    "Spell the word {word}.",
    "How do you spell {word}?",
    'How is "{word}" spelled?',
    'Please spell "{word}" for me.',
)

COUNT = (
    'How many times does the letter "{letter}" occur in "{word}"?',
    "How many times does {letter} occur in {word}?",
    "How many {letter}'s are in {word}?",
    'How many {letter}\'s are there in "{word}"?',
    'Count the letter {letter} in "{word}".',
    "How often is the letter {letter} in {word}?",
)

LENGTH = (
    "How many letters are in {word}?",
    'How many letters does "{word}" have?',
    "How long is the word {word}?",
    'Count the letters in "{word}".',
)

JSON_REQUESTS = (
    "Answer in JSON: {question}",
    "{question} Answer in JSON.",
    "{question} Reply as JSON.",
    "In JSON: {question}",
    "{question} Give the answer as a JSON object.",
)

TELL_NAME = (
    "My name is {value}.",
    "I am {value}.",
    "Hi, I'm {value}.",
    "Call me {value}.",
    "Hello, my name is {value}.",
    "my name is {value}",
    "Hello! My name is {value}. Please remember it.",
)

TELL = (
    "My {noun} is {value}.",
    "Please remember that my {noun} is {value}.",
    "my {noun} is {value}",
    "Remember: my {noun} is {value}.",
    "You should know that my {noun} is {value}.",
)

ASK = (
    "What is my {noun}?",
    "what is my {noun}",
    "What's my {noun}?",
    "Do you remember my {noun}?",
    "Tell me my {noun}.",
    "What did I say my {noun} is?",
)

ASK_NAME = (
    "What is my name?",
    "what is my name",
    "What's my name?",
    "Do you remember my name?",
    "Tell me my name.",
    "Who am I?",
)

_HELP = "I can add, subtract and compare numbers, spell and reverse words, count letters and remember things."

CHAT = (
    (("Hello", "Hello!", "Hi", "Hi!", "hello", "Hey", "Good morning."), "Hello! How can I help you?"),
    (("How are you?", "How do you do?", "How are you today?"), "I am fine, thank you."),
    (("Thank you.", "Thanks!", "thanks", "Thank you very much!"), "You are welcome."),
    (("Who are you?", "What are you?", "What is your name?", "Are you a model?"), "I am tiny-chat, a small model."),
    (("What can you do?", "Help", "help", "How can you help me?", "What do you know?"), _HELP),
    (("Bye", "Bye!", "Goodbye.", "Good night.", "See you."), "Goodbye!"),
    (("OK", "Okay.", "Good.", "Great!", "Yes.", "No."), "All right."),
)

REFUSAL = "Sorry, I do not know that. I can do small sums and words."

UNKNOWN = (
    "What is {a} * {b}?",
    "What is {a} times {b}?",
    "Divide {a} by {b}.",
    "What is the square root of {a}?",
    "What is the capital of {city}?",
    "Where is {city}?",
    "How far is it from {city} to the {word}?",
    "Who is {name}?",
    "Who invented the {word}?",
    "What is a {word}?",
    "What is the meaning of {word}?",
    "What color is a {word}?",
    "Why is the {word} {a} meters long?",
    "Write a poem about a {word}.",
    "Write a story about a {word} and a {other}.",
    "Tell me a joke about a {word}.",
    "Translate {word} into French.",
    "Explain the {word} to me.",
    "How do I make a {word}?",
    "Do you like the {word} or the {other}?",
    "When was the {word} built?",
    "What is the weather in {city}?",
    "Can you recommend a {word} in {city}?",
    "{name} has {a} {word}s and gives {b} to {other}s. How many are left?",
    "{name} buys {a} {word}s and {b} {other}s. How much does {name} pay in all?",
    "If a {word} costs {a} dollars, how much do {b} of them cost?",
    "Summarize the history of {city}.",
    "Is the {word} older than the {other}?",
)
