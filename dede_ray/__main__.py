from dede_ray.runtime.cli import main

if __name__ == "__main__":
    main()
