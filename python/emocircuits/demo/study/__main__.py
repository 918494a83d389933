"""``python -m emocircuits.demo.study``."""

from emocircuits.demo.study.run import main

if __name__ == "__main__":
    main()
