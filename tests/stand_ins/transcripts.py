"""Text as a reader of a stream gets it."""

from nemodiff.runtime.text.transcript import Transcript


def streamed(transcript: Transcript, ids: list[int]) -> tuple[str, list[int]]:
    """What a transcript shows before the last of ids that come one by one, and those up to a stop string.

    Ids are handed out once all of their text has been shown.
    """
    shown = ""
    for count in range(1, len(ids) + 1):
        if transcript.reaches_stop(ids[:count]):
            return shown, ids[:count]
        shown += transcript.push(ids[:count], final=False)
        whole = (n for n in range(count, -1, -1) if shown.startswith(transcript.codec.decode(ids[:n])))
        assert transcript.handed_out == next(whole)
    return shown, ids
