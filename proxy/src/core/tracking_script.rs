//! Which keys a command reads; of a script, told by its text.
//!
//! Invariant: in doubt it does; a reader that is told too much only asks again.

use slotmesh_command::{Arguments, Command, Flag};
use slotmesh_resp::{Args, Parsed, RequestParser};

use super::client::Client;
use super::spec::Request;

/// The keys that a command of this client reads where it is executed: what is queued, nothing; EXEC,
/// what all commands before it do.
pub(super) fn keys_read(client: &Client, command: &Command, request: &Request<'_>) -> Vec<Vec<u8>> {
    let mut keys = Vec::new();
    match &client.state.transaction {
        None => add_keys(&mut keys, command, request),
        Some(transaction) if command.name == "exec" => {
            let frames = &transaction.frames;
            let (mut parser, mut args, mut at) = (RequestParser::new(), Args::new(), 0);
            while let Ok(Parsed::Complete { consumed }) = parser.parse(&frames[at..], &mut args) {
                let request = Request {
                    frame: &frames[at..at + consumed],
                    args: &args,
                };
                if let Ok(command) = slotmesh_command::resolve(&request) {
                    add_keys(&mut keys, command, &request);
                }
                at += consumed;
            }
        }
        Some(_) => {}
    }
    keys
}

fn add_keys(keys: &mut Vec<Vec<u8>>, command: &Command, request: &Request<'_>) {
    let reads = match command.name {
        "eval" | "eval_ro" => script_may_read(request.argument(1)),
        "evalsha" | "evalsha_ro" | "fcall" | "fcall_ro" => true,
        _ => command.flags.has(Flag::ReadOnly),
    };
    if reads {
        let places = command.keys(request).unwrap_or_default();
        keys.extend(places.into_iter().map(|at| request.argument(at).to_vec()));
    }
}

/// Whether a script may read a key. Only one whose every call names, word for word, a command that
/// reads nothing does not.
fn script_may_read(script: &[u8]) -> bool {
    // Other ways to the same functions.
    const DOORS: [&[u8]; 6] = [b"_G", b"load", b"fenv", b"metatable", b"require", b"debug"];
    if DOORS
        .iter()
        .any(|door| memchr::memmem::find(script, door).is_some())
    {
        return true;
    }
    memchr::memmem::find_iter(script, b"redis").any(|at| {
        let call = &script[at + b"redis".len()..];
        let rest = (call.strip_prefix(b".call(")).or_else(|| call.strip_prefix(b".pcall("));
        let name = rest.and_then(|rest| {
            let (quote, rest) = rest.split_first()?;
            let end = memchr::memchr(*quote, rest)?;
            matches!(quote, b'\'' | b'"').then_some(&rest[..end])
        });
        let command = name.and_then(slotmesh_command::lookup);
        command.is_none_or(|command| command.flags.has(Flag::ReadOnly) || command.has_subcommands())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_scripts_whose_every_call_reads_nothing_are_taken_for_that() {
        assert!(!script_may_read(b"redis.call('set', KEYS[1], 'x')"));
        assert!(!script_may_read(b"redis.pcall(\"ping\") return 1"));
        assert!(script_may_read(
            b"redis.call('set', 'a', redis.call('get', KEYS[1]))"
        ));
        assert!(script_may_read(b"local r = redis r.call('get', KEYS[1])"));
        assert!(script_may_read(b"redis.call(ARGV[1], KEYS[1])"));
        assert!(script_may_read(b"_G['red' .. 'is'].call('get', 'k')"));
    }
}
