"""The options of each verb, from which its Python call, its command and its form in the app are made."""
