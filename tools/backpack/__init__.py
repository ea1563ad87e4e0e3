"""How the Backpacks were trained: the arms that ask what k does, and the demo's Backpack."""
