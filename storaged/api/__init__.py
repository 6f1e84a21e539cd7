"""The Varlink API. Only this package imports asyncvarlink."""
