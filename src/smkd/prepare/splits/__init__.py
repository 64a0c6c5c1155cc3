"""The class lists, as package data; `README.md` names their sources."""
