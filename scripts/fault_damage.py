from fault_tmpfs import Report


def damage_report(work, truncations, flips, seed, pool):
    return Report("todo")
