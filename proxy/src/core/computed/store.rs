//! Replaces a key by a computed set or sorted set.
//!
//! Invariant: the key is replaced as a whole, in one block of its shard, or stays as it was. An empty
//! result deletes it.

use super::super::job::{Answers, Round, Step};
use super::super::retry::Effect;
use super::read;
use slotmesh_resp::write;

/// Arguments of one SADD or ZADD: the node serves nobody else while it executes the block, but it
/// parses each command by itself. Even, so that a score and its member stay together.
const CHUNK_ARGUMENTS: usize = 4096;

/// Options, and arguments that may be spread over several commands.
pub(super) type Pass<'a> = (&'a [&'a [u8]], &'a [&'a [u8]]);

/// The last phase of a command that stores.
#[derive(Debug)]
pub(super) struct Store {
    destination: Vec<u8>,
    cardinality: usize,
    /// What EXEC said when the node refused to queue something, until the reason is known.
    aborted: Option<Vec<u8>>,
}

impl Store {
    /// Asks for it. Each pass is what follows the key in `verb`.
    pub(super) fn begin(
        destination: Vec<u8>,
        verb: &[u8],
        passes: &[Pass<'_>],
        cardinality: usize,
        round: &mut Round<'_>,
    ) -> Self {
        if cardinality == 0 {
            round.ask_owner(&destination, Effect::Write, &[b"DEL", &destination]);
        } else {
            let mut block = vec![vec![b"DEL".as_slice(), &destination]];
            for (options, arguments) in passes {
                for chunk in arguments.chunks(CHUNK_ARGUMENTS) {
                    let mut command = vec![verb, &destination];
                    command.extend_from_slice(options);
                    command.extend_from_slice(chunk);
                    block.push(command);
                }
            }
            round.ask_block(round.shard_of(&destination), round.db, &block);
        }
        Self {
            destination,
            cardinality,
            aborted: None,
        }
    }

    pub(super) fn next(&mut self, answers: &Answers, round: &mut Round<'_>) -> Step {
        let answer = answers.first().map(Vec::as_slice).unwrap_or_default();
        if let Some(aborted) = &self.aborted {
            return round.pass(reason(answer).unwrap_or(aborted));
        }
        if answer.starts_with(b"-EXECABORT") {
            ask_reason(&self.destination, round);
            self.aborted = Some(answer.to_vec());
            return Step::Asked;
        }
        if let Some(error) = block_error(answer) {
            return round.pass(error);
        }
        let cardinality = self.cardinality as i64;
        round.done(|out, _| write::write_int(out, cardinality))
    }
}

/// EXEC does not say why a command was not queued. This write changes nothing, whatever the key
/// holds, and is refused for the same reason.
pub(super) fn ask_reason(key: &[u8], round: &mut Round<'_>) {
    round.ask_owner(key, Effect::Write, &[b"SETRANGE", key, b"0", b""]);
}

/// The reason, if the answer to [`ask_reason`] tells one.
pub(super) fn reason(answer: &[u8]) -> Option<&[u8]> {
    (read::is_error(answer) && !read::is_wrong_type(answer)).then_some(answer)
}

/// The answer itself if it is an error, or the first error in EXEC's array.
pub(super) fn block_error(answer: &[u8]) -> Option<&[u8]> {
    if read::is_error(answer) {
        return Some(answer);
    }
    let items = read::items(answer).unwrap_or_default();
    items.into_iter().find(|item| read::is_error(item))
}
