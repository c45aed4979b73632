# SPDX-License-Identifier: Apache-2.0
"""Where pages should be, and in which order to move them there."""


def layout(chains, remembered, places):
    """Move chains to the first of `places`, in order, and what is remembered out of their way.

    Parameters
    ----------
    chains : list of list of int
        Pages of sequences, which may begin with the same ones.
    remembered : list of int
        Pages that may be anywhere.
    places : list of int
        Ascending; a page that is none of them stays.

    Returns
    -------
    dict {int: int}
        Page to its new place, where that is another.
    """
    allowed = set(places)
    order = dict.fromkeys(page for pages in chains for page in pages if page in allowed)
    wanted = dict(zip(order, places, strict=False))
    taken = set(wanted.values())
    free = allowed - taken - set(remembered)
    vacant = iter([*sorted(free - order.keys()), *sorted(free & order.keys())])   # empty ones first: fewer circles
    wanted |= {page: next(vacant) for page in remembered if page in taken}
    return {page: place for page, place in wanted.items() if page != place}


def rounds(wanted, empty):
    """Moves ``{page: place}`` as rounds of moves in which no page is both left and entered.

    `empty` pages are the room to move in. Pages that change places in a circle go through one of them; without any,
    circles are left out.
    """
    wanted, empty, done = dict(wanted), set(empty), []
    while wanted:
        now = {page: place for page, place in wanted.items() if place not in wanted}
        if not now and not empty:
            break
        if not now:
            page = next(iter(wanted))
            now = {page: min(empty)}
            wanted[now[page]] = wanted[page]
        for page in now:
            del wanted[page]
        empty = empty - set(now.values()) | set(now)
        done.append(now)
    return done
