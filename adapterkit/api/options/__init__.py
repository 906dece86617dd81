"""What each verb takes: tables, of which its Python call, its command and its form in the app are made."""
