/* A migration over two channels that are one line: what the copy holds when it is given the right to run.
 *
 * A page goes over the same channel each time, in order. A round is over when every channel has sent its share, and all
 * that was dirtied meanwhile is for the next one. When the source is paused each channel carries its last frames and its
 * END; when all of them have ended the copy is complete, and says so (HAVE). The line may break, with what is under way
 * on either channel: the copy hangs up on both, and says on the next line how many frames of each it has applied. Pages
 * that went in later ones go again.
 *
 * In a second form (DAMAGED) there is one page more, page 2 on channel 0, nothing is written, and a frame arrives damaged:
 * its bytes are summed while they are laid, and lie in any page of its channel. The copy counts nothing of that channel as
 * applied then, and hangs up.
 *
 * Variants: HAVE_AFTER_ONE_END, ROUND_ENDS_WITH_ONE, PAGES_CHANGE_CHANNELS, OLD_CHANNEL_IS_READ_ON,
 * APPLIED_OF_ONE_FOR_ALL; of the second form DAMAGE_TAKES_NOTHING_BACK.
 */
#define PENDING 99
#define GARBAGE 9

mtype = { PAGE, END };

chan forth[4] = [3] of { mtype, byte, byte };  /* line 0: channels 0 and 1; line 1: channels 2 and 3 */
byte line;                                     /* the newest line */
byte copy_at;                                  /* the line that the copy is on */
byte memory[3], copied[3];
bool dirty[2], ended[2], paused, complete;
byte sent[2], applied[2];                      /* frames of each channel */
byte frame[3];                                 /* in which frame of its channel each page went last */

#ifdef PAGES_CHANGE_CHANNELS
#define ON(page, channel) true
#else
#define ON(page, channel) (page % 2 == channel)
#endif

proctype program()
{
    do
#ifndef DAMAGED
    :: atomic { !paused && memory[0] < 1 -> memory[0]++; dirty[0] = true; printf("page 0 becomes %d\n", memory[0]) }
    :: atomic { !paused && memory[1] < 1 -> memory[1]++; dirty[1] = true; printf("page 1 becomes %d\n", memory[1]) }
#endif
    :: paused -> break
    od
}

inline go(page, channel)
{
    atomic {
        at == line && frame[page] == PENDING && ON(page, channel) && nfull(forth[2 * at + channel]) ->
        printf("page %d goes over channel %d of line %d as %d\n", page, channel, at, memory[page]);
        forth[2 * at + channel]!PAGE(page, memory[page]);
        frame[page] = sent[channel];
        sent[channel]++
    }
}

inline collect()
{
    atomic {
        if :: dirty[0] -> frame[0] = PENDING :: else fi;
        if :: dirty[1] -> frame[1] = PENDING :: else fi;
        dirty[0] = false;
        dirty[1] = false
    }
}

proctype source()
{
    byte at;
round:
    do
    :: go(0, 0)
    :: go(1, 1)
#ifdef DAMAGED
    :: go(2, 0)
#endif
#ifdef PAGES_CHANGE_CHANNELS
    :: go(0, 1)
    :: go(1, 0)
#endif
#ifdef ROUND_ENDS_WITH_ONE
    :: atomic { frame[0] != PENDING && at == line -> frame[1] = (frame[1] == PENDING -> 0 : frame[1]) }; break
#else
    :: atomic { frame[0] != PENDING && frame[1] != PENDING && frame[2] != PENDING && at == line -> printf("the round is over\n") }; break
#endif
    :: at != line -> goto again
    od;
    if
    :: !paused -> collect(); goto round
    :: atomic { !paused -> paused = true; printf("the source is paused\n") }; collect(); goto round
    :: else
    fi;
    do
    :: atomic { at == line && nfull(forth[2 * at + 1]) -> forth[2 * at + 1]!END(0, 0) }; break
    :: at != line -> goto again
    od;
    do
    :: atomic { at == line && nfull(forth[2 * at]) -> forth[2 * at]!END(0, 0) }; break
    :: at != line -> goto again
    od;
    do
    :: complete -> goto give
    :: at != line && !complete -> goto again
    od;
again:
    atomic { copy_at == line -> at = line; printf("the source comes on line %d\n", at) };
    if
    :: complete -> goto give
    :: else
    fi;
    atomic {
        printf("of channel 0 %d frames are applied, of channel 1 %d\n", applied[0], applied[1]);
        if :: frame[0] >= applied[0] -> frame[0] = PENDING :: else fi;
#ifdef DAMAGED
        if :: frame[2] >= applied[0] -> frame[2] = PENDING :: else fi;
#endif
#ifdef APPLIED_OF_ONE_FOR_ALL
        if :: frame[1] >= applied[0] -> frame[1] = PENDING :: else fi;
#else
        if :: frame[1] >= applied[1] -> frame[1] = PENDING :: else fi;
#endif
        sent[0] = applied[0];
        sent[1] = applied[1]
    };
    goto round;
give:
#ifdef CHECK_KEPT
    atomic {
        printf("the copy may run with %d and %d, the source has %d and %d\n", copied[0], copied[1], memory[0], memory[1]);
        assert(copied[0] == memory[0] && copied[1] == memory[1] && copied[2] == memory[2])
    };
#endif
    skip
}

/* The copy's end of one channel of one line. */
proctype taker(byte at, channel)
{
    byte page, version;
    do
#ifdef OLD_CHANNEL_IS_READ_ON
    :: atomic { forth[2 * at + channel]?PAGE(page, version) ->
#else
    :: atomic { at == copy_at && forth[2 * at + channel]?[PAGE, page, version] -> forth[2 * at + channel]?PAGE(page, version);
#endif
           copied[page] = version;
           applied[channel]++;
           printf("page %d is laid as %d, from line %d\n", page, version, at) }
#ifdef DAMAGED
    :: atomic {
           at == copy_at && line < 1 && forth[2 * at + channel]?[PAGE, page, version] ->
           forth[2 * at + channel]?PAGE(page, version);
           if :: page = channel :: channel == 0 -> page = 2 fi;
           copied[page] = GARBAGE;
#ifndef DAMAGE_TAKES_NOTHING_BACK
           applied[channel] = 0;
#endif
           /* It reads no further on this line. */
           ended[0] = false;
           ended[1] = false;
           line++;
           copy_at = line;
           printf("a damaged frame of channel %d is laid in page %d; the copy hangs up\n", channel, page)
       }
#endif
    :: atomic { at == copy_at && forth[2 * at + channel]?[END, _, _] -> forth[2 * at + channel]?END(_, _);
           ended[channel] = true;
           printf("channel %d has ended\n", channel) }
    :: timeout -> break
    od
}

proctype copy()
{
    do
    :: atomic {
           copy_at != line && !complete ->
           ended[0] = false;
           ended[1] = false;
           copy_at = line;
           printf("the copy comes to line %d\n", line)
       }
    :: atomic { copy_at != line && complete -> copy_at = line }
#ifdef HAVE_AFTER_ONE_END
    :: atomic { ended[0] && !complete -> complete = true; printf("the copy says that it has everything\n") }
#else
    :: atomic { ended[0] && ended[1] && !complete -> complete = true; printf("the copy says that it has everything\n") }
#endif
    :: timeout -> break
    od
}

proctype breaks()
{
    if
    :: atomic { line < 1 -> line++; printf("the line breaks\n") }
    :: skip
    fi
}

init
{
    atomic {
        frame[0] = PENDING;
        frame[1] = PENDING;
#ifdef DAMAGED
        frame[2] = PENDING;
#endif
        run program();
        run source();
        run taker(0, 0);
        run taker(0, 1);
        run taker(1, 0);
        run taker(1, 1);
        run copy();
        run breaks()
    }
}
