"""Does this installation draw and simulate what LIBERO's own simulator, mujoco 2.3.7, does?

python simulator_check.py
"""

from simulator.self_check import main

if __name__ == "__main__":
    main()
