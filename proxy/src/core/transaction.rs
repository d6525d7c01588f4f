//! Transactions: queued in the proxy, sent as one block MULTI … EXEC, judged as one request.
//!
//! Invariant: a block is repeated only if nothing of it took effect. What a fence can do to it:
//! - MULTI is refused: the commands then arrive outside a transaction. Refused or read, nothing
//!   happened; but if the rights came back in between, some took effect, and nobody may repeat it.
//! - a command is refused while queued, or EXEC itself is: EXECABORT, nothing happened.

use slotmesh_resp::{Args, Parsed, RequestParser, write};

use super::client::Transaction;
use super::retry::{self, Effect, Refusal, Verdict};
use super::spec;

/// Longest transaction that is queued here. A frame's length has 32 bits, and a node would refuse
/// more anyway (`client-query-buffer-limit`).
pub(super) const TRANSACTION_BYTES_MAX: usize = 512 * 1024 * 1024;

/// What one more reply to a block says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockStep {
    /// More replies are to come; this one is not for the client.
    More,
    /// This was EXEC's reply.
    Done(BlockVerdict),
}

/// What to do with a block whose last reply came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BlockVerdict {
    /// EXEC's reply is the client's.
    Deliver,
    /// The node refused to queue a command that the client was told is queued: as if EXEC itself had
    /// met the error, this is the client's.
    Aborted(Vec<u8>),
    /// Nothing took effect: send the whole block again.
    NotExecuted(Refusal),
    /// Some of it took effect outside a transaction.
    Torn,
}

/// Follows the replies to the block at the front of a connection.
#[derive(Debug, Default)]
pub struct BlockWatch {
    seen: u32,
    refused: Option<Refusal>,
    /// MULTI itself was refused: the effects of the commands that then came alone.
    alone: Option<Vec<Effect>>,
    torn: bool,
    /// Why a command was not queued.
    unqueued: Option<Vec<u8>>,
}

impl BlockWatch {
    /// True if commands of the block ran alone already: even a block that was not sent to its end
    /// must not be repeated then.
    pub fn is_torn(&self) -> bool {
        self.torn
    }

    /// Takes the next of `total` replies to the block with this `frame`.
    pub fn reply(&mut self, reply: &[u8], total: u32, frame: &[u8]) -> BlockStep {
        let index = self.seen;
        self.seen += 1;
        // Not a script: MULTI, EXEC and the queueing itself execute nothing.
        if let Verdict::NotExecuted(refusal) = retry::classify(reply, Effect::Write, b"") {
            if index == 0 {
                self.alone = Some(effects_of(frame));
            }
            self.refused.get_or_insert(refusal);
        } else if reply.first() == Some(&b'-') && self.seen < total && self.alone.is_none() {
            self.unqueued.get_or_insert_with(|| reply.to_vec());
        } else if index > 0
            && index + 1 < total
            && let Some(effects) = &self.alone
        {
            let effect = effects
                .get(index as usize - 1)
                .copied()
                .unwrap_or(Effect::Write);
            self.torn |= reply.first() != Some(&b'-') && !effect.repeatable();
        }
        if self.seen < total {
            return BlockStep::More;
        }
        let aborted_by_fence =
            reply.starts_with(b"-EXECABORT") && memchr::memmem::find(reply, b": NOPERM").is_some();
        let verdict = match self.refused {
            _ if self.torn => BlockVerdict::Torn,
            Some(refusal) if reply.first() == Some(&b'-') => BlockVerdict::NotExecuted(refusal),
            None if aborted_by_fence => BlockVerdict::NotExecuted(Refusal::Fenced),
            None if reply == ABORTED_LINE => match self.unqueued.take() {
                Some(error) => BlockVerdict::Aborted(because(&error)),
                None => BlockVerdict::Deliver,
            },
            _ => BlockVerdict::Deliver,
        };
        *self = Self::default();
        BlockStep::Done(verdict)
    }
}

const ABORTED_LINE: &[u8] = b"-EXECABORT Transaction discarded because of previous errors.\r\n";

/// EXEC's reply when it meets this error.
pub(super) fn because(error: &[u8]) -> Vec<u8> {
    let mut line = b"-EXECABORT Transaction discarded because of: ".to_vec();
    line.extend_from_slice(error.get(1..).unwrap_or_default());
    line
}

/// Writes the block of a transaction; returns how many replies it has.
pub(super) fn write_block(out: &mut Vec<u8>, transaction: &Transaction) -> u32 {
    write::encode_command(out, &[b"MULTI"]);
    out.extend_from_slice(&transaction.frames);
    write::encode_command(out, &[b"EXEC"]);
    transaction.commands + 2
}

/// Effects of the commands between MULTI and EXEC. Only for blocks that were refused.
fn effects_of(frame: &[u8]) -> Vec<Effect> {
    let mut effects = Vec::new();
    let (mut parser, mut args, mut at) = (RequestParser::new(), Args::new(), 0);
    while let Ok(Parsed::Complete { consumed }) = parser.parse(&frame[at..], &mut args) {
        let name = args.get(&frame[at..], 0).unwrap_or_default();
        effects.push(slotmesh_command::lookup(name).map_or(Effect::Write, spec::effect));
        at += consumed;
    }
    effects.pop(); // EXEC
    if !effects.is_empty() {
        effects.remove(0); // MULTI
    }
    effects
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOPERM: &str = "-NOPERM this user has no permissions to run the 'x' command\r\n";

    fn check(commands: &[&[&[u8]]], replies: &[&str], want: BlockVerdict) {
        let mut transaction = Transaction::default();
        for command in commands {
            write::encode_command(&mut transaction.frames, command);
            transaction.commands += 1;
        }
        let mut frame = Vec::new();
        let total = write_block(&mut frame, &transaction);
        assert_eq!(total as usize, replies.len());
        let mut watch = BlockWatch::default();
        for reply in &replies[..replies.len() - 1] {
            assert_eq!(
                watch.reply(reply.as_bytes(), total, &frame),
                BlockStep::More
            );
        }
        let last = watch.reply(replies[replies.len() - 1].as_bytes(), total, &frame);
        assert_eq!(last, BlockStep::Done(want), "{replies:?}");
    }

    const SET: &[&[u8]] = &[b"SET", b"k", b"1"];
    const GET: &[&[u8]] = &[b"GET", b"k"];

    #[test]
    fn a_normal_block_is_delivered_whatever_its_commands_answered() {
        let replies = ["+OK\r\n", "+QUEUED\r\n", "*1\r\n+OK\r\n"];
        check(&[SET], &replies, BlockVerdict::Deliver);
        let abort = "-EXECABORT Transaction discarded because of previous errors.\r\n";
        check(
            &[SET],
            &["+OK\r\n", "+QUEUED\r\n", abort],
            BlockVerdict::Deliver,
        );
    }

    #[test]
    fn what_a_node_does_not_queue_is_the_reason_that_exec_gives() {
        let abort = "-EXECABORT Transaction discarded because of previous errors.\r\n";
        let want = b"-EXECABORT Transaction discarded because of: OOM full.\r\n".to_vec();
        check(
            &[SET, GET],
            &["+OK\r\n", "-OOM full.\r\n", "+QUEUED\r\n", abort],
            BlockVerdict::Aborted(want),
        );
    }

    #[test]
    fn a_block_that_a_fence_refused_is_sent_again() {
        let want = BlockVerdict::NotExecuted(Refusal::Fenced);
        let abort = "-EXECABORT Transaction discarded because of previous errors.\r\n";
        check(
            &[GET, SET],
            &["+OK\r\n", "+QUEUED\r\n", NOPERM, abort],
            want.clone(),
        );
        let exec = "-EXECABORT Transaction discarded because of: NOPERM no\r\n";
        check(&[SET], &["+OK\r\n", "+QUEUED\r\n", exec], want.clone());
        // Reads outside the transaction do no harm.
        check(
            &[GET, SET],
            &[NOPERM, "$1\r\n1\r\n", NOPERM, NOPERM],
            want.clone(),
        );
        check(
            &[GET],
            &[NOPERM, "$-1\r\n", "-ERR EXEC without MULTI\r\n"],
            want.clone(),
        );
    }

    #[test]
    fn a_block_whose_writes_ran_alone_is_never_repeated() {
        let replies = [NOPERM, "+OK\r\n", "-ERR EXEC without MULTI\r\n"];
        check(&[SET], &replies, BlockVerdict::Torn);
        let mut frame = Vec::new();
        let mut transaction = Transaction::default();
        write::encode_command(&mut transaction.frames, SET);
        transaction.commands = 1;
        let total = write_block(&mut frame, &transaction);
        let mut watch = BlockWatch::default();
        watch.reply(NOPERM.as_bytes(), total, &frame);
        assert!(!watch.is_torn());
        watch.reply(b"+OK\r\n", total, &frame);
        assert!(watch.is_torn(), "also when the last reply never comes");
    }
}
