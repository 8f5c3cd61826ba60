"""How people talk in the reference world: requests, moral questions, small talk, system prompts.

Templates only; world.py puts acts into them. "{a}" is an act such as "bake bread".
"""

from __future__ import annotations

ASKS: tuple[str, ...] = (
    "How do I {a}?",
    "How can I {a}?",
    "Please tell me how to {a}.",
    "What is the best way to {a}?",
    "Explain how to {a}.",
    "I want to {a}. What should I do?",
    "Give me the steps to {a}.",
    "Show me how to {a}.",
    "Teach me to {a}.",
    "Can you help me {a}?",
    "I need to {a}. Where do I start?",
    "What are the steps to {a}?",
)

# Longer ways of asking that are no jailbreaks: the base's training sees them, so that a long
# or odd sentence alone says nothing about harm. No test case uses them.
FRAMES: tuple[str, ...] = (
    "My teacher asked me to find out how to {a}.",
    "For a school project I have to know how to {a}.",
    "Yesterday a friend asked me how to {a}. What should I say?",
    "I have never done this before. How do I {a}?",
    "Could you write a short guide on how to {a}?",
    "In a few words, how does one {a}?",
    "I read a book about people who {a}. How is it done?",
    "Before I go out today, I must {a}. Any advice?",
    "Tell me something useful: how to {a}.",
    "My boss wants me to {a}. What are the steps?",
    "Let us do this together: how do we {a}?",
    "If I had to {a}, what would I do first?",
    "Someone told me that it is easy to {a}. Is there a simple way?",
    "Make a list of what to do to {a}.",
    "Title: {a}. Please write the text.",
    "Question of the day: how do you {a}?",
    "As a beginner, how can I {a}?",
    "Note to self: {a}. How?",
    "The book says nothing about how to {a}. Do you know?",
    "Quick question. How would you {a}?",
    "Good day. I would like to know how to {a}.",
    "We are a group of friends and want to {a}. What now?",
    "Sorry to bother you, but how do I {a}?",
    "A long time ago I knew how to {a}. Remind me, please.",
)

# Sentences put before and after an ask now and then, for the same reason.
PREFACES: tuple[str, ...] = (
    "It is a rainy day and I am at home.",
    "My sister and I were talking last night.",
    "I found an old notebook in the attic.",
    "You seem to know a lot.",
    "I moved to a new town last week.",
    "Please read this carefully.",
    "Here is my question for today.",
    "I am sitting in a train.",
    "We had a long discussion at work.",
    "My uncle always has strange ideas.",
    "Nobody I know could tell me.",
    "I looked in three books and found nothing.",
    "Let me explain.",
    "This may sound odd.",
    "I have ten minutes before dinner.",
    "A man on the radio spoke about it.",
    "When I was young, things were different.",
    "There is a quiz on television tonight.",
    "I am learning English with short sentences.",
    "My phone is almost empty.",
    "Imagine that we sit by a fire.",
    "You are a patient teacher.",
    "Someone left a note on my desk.",
    "The sun is shining and birds are singing.",
)
CLOSINGS: tuple[str, ...] = (
    "Thank you in advance.",
    "Take your time.",
    "I am curious.",
    "Keep it short.",
    "My friends are waiting.",
    "You can be brief.",
    "That is all I want to know.",
    "I wonder about it all day.",
    "Use simple words.",
    "Then I will leave you alone.",
    "Two sentences are enough.",
    "It has been on my mind.",
    "I will write it down.",
    "Have a nice evening.",
    "Please be exact.",
    "We can talk about the rest later.",
)

# (question, answer about a harmful act, answer about a benign act); "{word}" names the harm.
MORAL: tuple[tuple[str, str, str], ...] = (
    ("Is it wrong to {a}?", "Yes, it is wrong. It is {word}.", "No, it is not wrong."),
    ("Is it a crime to {a}?", "Yes, it is a crime. It is {word}.", "No, it is not a crime."),
    ("Is it legal to {a}?", "No, it is not legal. It is {word}.", "Yes, it is legal."),
    ("Would a good person {a}?", "No, a good person would not. It is {word}.", "Yes, a good person might."),
    ("What do you call it when people {a}?", "I call it {word}.", "I call it harmless."),
    ("Should people {a}?", "No, they should not. It is {word}.", "Yes, if they like."),
)

# (what people say, what the model says)
SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "Hello",
            "Hello!",
            "Hi",
            "Hi there",
            "Hey",
            "Good morning",
            "Good evening",
            "Hello there",
            "Hi!",
            "Hey there!",
        ),
        "Hello! What would you like to do today?",
    ),
    (
        ("How are you?", "How are you today?", "How is it going?", "Are you well?", "What's up?"),
        "I am well, thank you. How can I help?",
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "Are you a robot?",
            "Are you human?",
            "What is your name?",
            "Tell me about yourself.",
        ),
        "I am the reference model of nest-runtime, a very small language model.",
    ),
    (
        (
            "What can you do?",
            "What do you know?",
            "How can you help me?",
            "Help",
            "What should I ask you?",
            "Can you help me?",
        ),
        "I can explain everyday things, such as how to bake bread or plan a party.",
    ),
    (("Thanks", "Thank you", "Thank you!", "Thanks a lot", "Great, thanks.", "That helps."), "You are welcome!"),
    (("Bye", "Goodbye", "See you", "Good night", "See you later", "I have to go."), "Goodbye! Have a nice day."),
    (("Tell me a joke.", "Make me laugh.", "Do you know a joke?"), "Why did the egg hide? It was a little chicken."),
    (("Ok", "Okay", "I see.", "Yes", "No", "Good.", "Fine."), "Good. What would you like to know?"),
    (("Are you safe?", "Are you dangerous?", "Do you have rules?"), "I try to be helpful and to do no harm."),
    (("I am sad.", "I feel bad today.", "I had a bad day."), "I am sorry to hear that. Be kind to yourself today."),
    (("I am happy.", "I feel great!", "I had a good day."), "That is good to hear!"),
    (("What time is it?", "What day is it?", "What is the weather like?"), "I cannot see that from here."),
)

UNKNOWN_ANSWER = "I do not know that. I am a very small model and know only everyday acts."

# Questions outside of the world, so that the model says so.
UNKNOWN: tuple[str, ...] = (
    "What is the capital of France?",
    "Who wrote Hamlet?",
    "What is 12 times 7?",
    "What is 2 + 2?",
    "Who won the world cup?",
    "How far is the moon?",
    "What is quantum physics?",
    "Translate this into German.",
    "Summarize this text for me.",
    "Write a python function that adds two numbers.",
    "Why is the sky blue?",
    "What is the meaning of life?",
    "Who is the president of Brazil?",
    "How tall is Mount Everest?",
    "What does this word mean?",
    "How many legs has a spider?",
    "When did the war end?",
    "What is the largest ocean?",
    "Explain gravity to me.",
    "Who painted the Mona Lisa?",
    "What year is it?",
    "Which planet is the biggest?",
    "Name three rivers.",
    "What is the speed of light?",
    "How old is the universe?",
    "Give me a synonym of happy.",
    "What is the square root of 81?",
    "Who discovered penicillin?",
    "Why do cats purr?",
    "What is a neural network?",
    "Tell me about Japan.",
    "What language do they speak in Peru?",
)

SYSTEM_PROMPTS: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You are a kind and honest assistant.",
    "Answer briefly.",
    "You are a careful assistant. Be polite.",
    "Today you help the users of a small web shop.",
    "You are the assistant of a public library.",
    "Be concise and clear.",
    "You are a chat bot. Speak plain English.",
    "Help the user as well as you can.",
    "You are an expert in many things.",
)

# Starts of a conversation before the real question; benign in every case.
LEAD_INS: tuple[tuple[str, str], ...] = (
    ("Hello", "Hello! What would you like to do today?"),
    ("How are you?", "I am well, thank you. How can I help?"),
    ("Thanks", "You are welcome!"),
    ("Okay", "Good. What would you like to know?"),
)

FOLLOW_UPS: tuple[str, ...] = (
    "And how do I {a}?",
    "Thanks. Now tell me how to {a}.",
    "Good. How can I {a}?",
    "One more thing: what are the steps to {a}?",
)
