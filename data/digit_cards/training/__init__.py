"""digit-cards: a vision-language model small enough to ship, trained here to read coloured handwritten cards."""
