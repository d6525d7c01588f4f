//! Which replies prove that a command was not executed, and what a lost connection leaves open.
//!
//! Invariant: a command is repeated only if it certainly had no effect, or if it only reads.
//! "Certainly" is a property of the reply *and* of the command: a script may answer `READONLY`
//! after half of it ran, so for a script only a refusal of the script itself counts.
//!
//! Pure: bytes and a kind in, a verdict out. [`super::hold::ShardGate::judge`] adds what depends on
//! the shard's state; use that one where a gate exists.

/// What executing a command can do to the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Only reads: may always be repeated.
    Read,
    /// May change data, or do something that must not happen twice (PUBLISH).
    Write,
    /// EVAL and its family: errors of the commands inside can look like refusals of the whole.
    Script,
    /// EVAL_RO and its family: as a script for replies, as a read for a lost connection.
    ReadScript,
}

impl Effect {
    /// True if running the command a second time changes nothing.
    #[must_use]
    pub fn repeatable(self) -> bool {
        matches!(self, Self::Read | Self::ReadScript)
    }
}

/// Why the node did not execute a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The user's rights were taken: the shard's epoch is being ended.
    Fenced,
    /// The node is a replica now.
    ReadOnly,
    /// The node has too few replicas to accept a write.
    NoReplicas,
    /// The node is still loading its data.
    Loading,
    /// The node is a replica without a link to its primary.
    MasterDown,
    /// The login of this connection is not valid (any more).
    OldLogin,
}

/// What to do with a reply of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is the client's answer.
    Deliver,
    /// The command was not executed: keep it and send it again, in order.
    NotExecuted(Refusal),
    /// It was executed and only read, but something of the same connection before it was not
    /// executed: its answer could contradict the order, so ask again.
    ReadAgain,
}

/// What a connection that was lost before the reply leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Not executed, or only a read: send it again.
    Retry,
    /// Executed or not, nobody knows: the client must be told, the command is never repeated.
    OutcomeUnknown,
}

const ENGINE_LOADING: &[u8] = b" is loading the dataset in memory\r\n";
const ENGINE_NO_AUTH: &[u8] = b"-NOAUTH Authentication required.\r\n";

/// Judges one whole reply by itself. `command` is the name of the command, for scripts: the refusal
/// must name the script command, not one inside it.
#[must_use]
pub fn classify(reply: &[u8], effect: Effect, command: &[u8]) -> Verdict {
    if reply.first() != Some(&b'-') {
        return Verdict::Deliver;
    }
    let script = matches!(effect, Effect::Script | Effect::ReadScript);
    let word = reply[1..]
        .split(|b| *b == b' ' || *b == b'\r')
        .next()
        .unwrap_or_default();
    let refusal = match word {
        b"NOPERM" if !script || names_command(reply, command) => Refusal::Fenced,
        // A script can return any error that its author likes, so only the engine's own text counts.
        b"LOADING" if !script || reply.ends_with(ENGINE_LOADING) => Refusal::Loading,
        b"NOAUTH" if !script || reply == ENGINE_NO_AUTH => Refusal::OldLogin,
        b"WRONGPASS" if !script => Refusal::OldLogin,
        b"READONLY" if !script => Refusal::ReadOnly,
        b"NOREPLICAS" if !script => Refusal::NoReplicas,
        b"MASTERDOWN" if !script => Refusal::MasterDown,
        _ => return Verdict::Deliver,
    };
    Verdict::NotExecuted(refusal)
}

/// Whether an error says that the node could not do what another one could: it is full, can't save, or
/// is of an engine that does not have the command. What no table has is not asked of a node. The words of
/// a script's error may be its author's, and the script's fault.
#[must_use]
pub fn is_nodes_fault(reply: &[u8], effect: Effect) -> bool {
    if matches!(effect, Effect::Script | Effect::ReadScript) {
        return false;
    }
    const WORDS: [&[u8]; 8] = [
        b"-OOM ",
        b"-MISCONF ",
        b"-LOADING ",
        b"-MASTERDOWN ",
        b"-NOREPLICAS ",
        b"-READONLY ",
        b"-ERR unknown command ",
        b"-ERR unknown subcommand ",
    ];
    WORDS.iter().any(|word| reply.starts_with(word))
}

/// Judges a request whose connection went away. `fully_sent` says that its last byte was given to
/// the socket: a node executes nothing of a frame that is not complete.
#[must_use]
pub fn after_loss(effect: Effect, delivery: Delivery) -> Loss {
    match (effect.repeatable(), delivery) {
        (true, _) | (_, Delivery::Partial) => Loss::Retry,
        (false, Delivery::Full) => Loss::OutcomeUnknown,
    }
}

/// How much of a request had been given to the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Not its last byte.
    Partial,
    /// All of it.
    Full,
}

/// True for `-NOPERM … to run the 'eval' command …` and `command` = EVAL.
fn names_command(reply: &[u8], command: &[u8]) -> bool {
    let Some(at) = memchr::memmem::find(reply, b" to run the '") else {
        return false;
    };
    let rest = &reply[at + b" to run the '".len()..];
    rest.len() >= command.len() && rest[..command.len()].eq_ignore_ascii_case(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_node_could_have_done_is_the_nodes_fault() {
        for fault in [
            "-OOM command not allowed when used memory > 'maxmemory'.\r\n",
            "-MISCONF Errors writing to the AOF file\r\n",
            "-ERR unknown command 'STRALGO', with args beginning with: \r\n",
        ] {
            assert!(is_nodes_fault(fault.as_bytes(), Effect::Write), "{fault}");
            assert!(!is_nodes_fault(fault.as_bytes(), Effect::Script), "{fault}");
        }
        for own in [
            "-WRONGTYPE Operation against a key\r\n",
            "-ERR syntax error\r\n",
            "+OOM \r\n",
        ] {
            assert!(!is_nodes_fault(own.as_bytes(), Effect::Write), "{own}");
        }
    }

    fn check(reply: &str, effect: Effect, want: Verdict) {
        assert_eq!(
            classify(reply.as_bytes(), effect, b"EVAL"),
            want,
            "{reply} {effect:?}"
        );
    }

    #[test]
    fn a_refusal_before_execution_is_kept_for_retry() {
        use Refusal::*;
        for (reply, refusal) in [
            (
                "-NOPERM this user has no permissions to run the 'set' command\r\n",
                Fenced,
            ),
            (
                "-READONLY You can't write against a read only replica.\r\n",
                ReadOnly,
            ),
            (
                "-NOREPLICAS Not enough good replicas to write.\r\n",
                NoReplicas,
            ),
            (
                "-LOADING Redis is loading the dataset in memory\r\n",
                Loading,
            ),
            ("-MASTERDOWN Link with MASTER is down\r\n", MasterDown),
            ("-NOAUTH Authentication required.\r\n", OldLogin),
        ] {
            check(reply, Effect::Write, Verdict::NotExecuted(refusal));
        }
    }

    #[test]
    fn ordinary_replies_and_errors_are_delivered() {
        for reply in [
            "+OK\r\n",
            "-WRONGTYPE x\r\n",
            "-OOM x\r\n",
            "$-1\r\n",
            "-NOPERMX y\r\n",
        ] {
            check(reply, Effect::Write, Verdict::Deliver);
        }
    }

    #[test]
    fn a_script_is_repeated_only_if_the_script_itself_was_refused() {
        let own = "-NOPERM User px-1 has no permissions to run the 'eval' command\r\n";
        check(own, Effect::Script, Verdict::NotExecuted(Refusal::Fenced));
        let inside = "-NOPERM User px-1 has no permissions to run the 'set' command\r\n";
        check(inside, Effect::Script, Verdict::Deliver);
        check(
            "-READONLY You can't write\r\n",
            Effect::Script,
            Verdict::Deliver,
        );
        check("-MASTERDOWN x\r\n", Effect::Script, Verdict::Deliver);
        for made_up in [
            "-NOAUTH no session\r\n",
            "-LOADING x\r\n",
            "-WRONGPASS x\r\n",
        ] {
            check(made_up, Effect::Script, Verdict::Deliver);
            check(made_up, Effect::ReadScript, Verdict::Deliver);
        }
        check(
            "-LOADING Redis is loading the dataset in memory\r\n",
            Effect::Script,
            Verdict::NotExecuted(Refusal::Loading),
        );
        check(
            "-NOAUTH Authentication required.\r\n",
            Effect::Script,
            Verdict::NotExecuted(Refusal::OldLogin),
        );
    }

    #[test]
    fn a_write_that_was_sent_whole_is_never_repeated_after_a_loss() {
        assert_eq!(
            after_loss(Effect::Write, Delivery::Full),
            Loss::OutcomeUnknown
        );
        assert_eq!(
            after_loss(Effect::Script, Delivery::Full),
            Loss::OutcomeUnknown
        );
        assert_eq!(after_loss(Effect::Write, Delivery::Partial), Loss::Retry);
        assert_eq!(after_loss(Effect::Read, Delivery::Full), Loss::Retry);
        assert_eq!(after_loss(Effect::ReadScript, Delivery::Full), Loss::Retry);
    }
}
