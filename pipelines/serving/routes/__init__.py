"""The routes by theme: users, pins, operations, pages. Each module registers its own with `register(app, ground)`."""
