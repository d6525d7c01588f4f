//! Checks of scripts that an instance may ask for (`script_check_enable`), in Tair's words.
//!
//! Invariant: without the parameter, and on one shard, nothing is refused here. A check looks at the
//! text alone: a key is an expression `KEYS[…]`, and what only running the script could tell is
//! refused.

use slotmesh_command::{Arguments, Class, Command};
use slotmesh_resp::parse_i64;
use slotmesh_topology::Slot;

use super::Core;
use super::spec::Request;

const NO_KEYS: &str =
    "ERR for redis cluster, eval/evalsha number of keys can't be negative or zero";
const OTHER_SLOT: &str = "ERR eval/evalsha command keys must be in same slot";
const BAD_SCRIPT: &str = "ERR bad lua script for redis cluster, all the keys that the script uses \
    should be passed using the KEYS array";
const NO_MESSAGES: &str = "ERR bad lua script for redis cluster, it must not use pub/sub commands";
const NO_UNPACK: &str = "ERR bad lua script for redis cluster, it must not use unpack";

impl Core {
    /// Why a script is not sent; `None`: it is.
    pub(super) fn script_refusal(
        &self,
        command: &'static Command,
        request: Request<'_>,
    ) -> Option<&'static str> {
        if !self.table.settings.parameters.script_check || self.table.only_shard().is_some() {
            return None;
        }
        match command.name {
            "script|load" => return check_text(request.arg(2)),
            "eval" | "eval_ro" | "evalsha" | "evalsha_ro" => {}
            _ => return None,
        }
        // What is no number, a node refuses in its own words.
        let count = parse_i64(request.arg(2))?;
        if count <= 0 {
            return Some(NO_KEYS);
        }
        let keys = (0..count as usize).map_while(|at| {
            let at = at.checked_add(3)?;
            (at < request.len()).then(|| request.arg(at))
        });
        let mut slots = keys.map(Slot::of);
        let first = slots.next();
        if slots.any(|slot| Some(slot) != first) {
            return Some(OTHER_SLOT);
        }
        let by_text = command.name.starts_with("eval") && !command.name.starts_with("evalsha");
        by_text.then(|| check_text(request.arg(1))).flatten()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token<'t> {
    Name(&'t [u8]),
    /// Between its quotes, as it is written.
    Text(&'t [u8]),
    Number(&'t [u8]),
    Sign(u8),
}

/// What is wrong with a script's text.
fn check_text(text: &[u8]) -> Option<&'static str> {
    let tokens = tokens(text);
    for at in 0..tokens.len() {
        if let Token::Name(b"unpack") = tokens[at] {
            return Some(NO_UNPACK);
        }
        let call = [b"call".as_slice(), b"pcall"].into_iter().any(|name| {
            let start = [Token::Name(b"redis"), Token::Sign(b'.'), Token::Name(name)];
            tokens[at..].starts_with(&start)
        });
        if call && let Some(problem) = check_call(&tokens[at + 3..]) {
            return Some(problem);
        }
    }
    None
}

/// The arguments of a call, as far as the text tells them.
struct Call<'t> {
    arguments: Vec<&'t [Token<'t>]>,
}

impl Arguments for Call<'_> {
    fn count(&self) -> usize {
        self.arguments.len()
    }

    fn argument(&self, index: usize) -> &[u8] {
        match self.arguments.get(index) {
            Some([Token::Text(text) | Token::Number(text)]) => text,
            _ => b"",
        }
    }
}

/// `tokens` begin behind `redis.call`.
fn check_call(tokens: &[Token<'_>]) -> Option<&'static str> {
    let Some(call) = read_call(tokens) else {
        return Some(BAD_SCRIPT); // called by another name later, or not at all
    };
    let Some([Token::Text(name)]) = call.arguments.first() else {
        return Some(BAD_SCRIPT);
    };
    // What no table has, a node judges.
    let command = slotmesh_command::lookup(name)?;
    let sub = (call.arguments.len() > 1).then(|| command.subcommand(call.argument(1)));
    let command = sub.flatten().unwrap_or(command);
    if command.class == Class::PubSub {
        return Some(NO_MESSAGES);
    }
    let Ok(keys) = command.keys(&call) else {
        return Some(BAD_SCRIPT);
    };
    let all = keys
        .into_iter()
        .all(|at| call.arguments.get(at).is_some_and(|key| is_key(key)));
    (!all).then_some(BAD_SCRIPT)
}

fn read_call<'t>(tokens: &'t [Token<'t>]) -> Option<Call<'t>> {
    let (Token::Sign(b'('), rest) = tokens.split_first()? else {
        return None;
    };
    let (mut depth, mut from, mut arguments) = (0_usize, 0, Vec::new());
    for (at, token) in rest.iter().enumerate() {
        match token {
            Token::Sign(b'(' | b'[' | b'{') => depth += 1,
            Token::Sign(b')') if depth == 0 => {
                arguments.push(&rest[from..at]);
                return Some(Call { arguments });
            }
            Token::Sign(b')' | b']' | b'}') => depth = depth.checked_sub(1)?,
            Token::Sign(b',') if depth == 0 => {
                arguments.push(&rest[from..at]);
                from = at + 1;
            }
            _ => {}
        }
    }
    None
}

/// `KEYS[…]` and nothing else.
fn is_key(expression: &[Token<'_>]) -> bool {
    let [
        Token::Name(b"KEYS"),
        Token::Sign(b'['),
        index @ ..,
        Token::Sign(b']'),
    ] = expression
    else {
        return false;
    };
    let mut depth = 0_i32;
    let inside = index.iter().all(|token| {
        match token {
            Token::Sign(b'[') => depth += 1,
            Token::Sign(b']') => depth -= 1,
            _ => {}
        }
        depth >= 0 // not KEYS[1] .. KEYS[2]
    });
    inside && !index.is_empty()
}

fn tokens(text: &[u8]) -> Vec<Token<'_>> {
    let mut tokens = Vec::new();
    let mut at = 0;
    while let Some(&byte) = text.get(at) {
        let rest = &text[at..];
        let word = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_';
        at += if let Some(comment) = rest.strip_prefix(b"--") {
            2 + match long_bracket(comment) {
                Some((_, len)) => len,
                None => memchr::memchr(b'\n', comment).unwrap_or(comment.len()),
            }
        } else if byte.is_ascii_digit() {
            let len = rest.iter().take_while(|b| word(b) || **b == b'.').count();
            tokens.push(Token::Number(&rest[..len]));
            len
        } else if word(&byte) {
            let len = rest.iter().take_while(|b| word(b)).count();
            tokens.push(Token::Name(&rest[..len]));
            len
        } else if matches!(byte, b'"' | b'\'') {
            let len = quoted(rest);
            tokens.push(Token::Text(&rest[1..len.max(2) - 1]));
            len
        } else if let Some((inner, len)) = long_bracket(rest) {
            tokens.push(Token::Text(inner));
            len
        } else {
            if !byte.is_ascii_whitespace() {
                tokens.push(Token::Sign(byte));
            }
            1
        };
    }
    tokens
}

/// Length of a string with its quotes; to the end if it has none.
fn quoted(text: &[u8]) -> usize {
    let mut at = 1;
    while let Some(&byte) = text.get(at) {
        at += match byte {
            b'\\' => 2,
            _ if byte == text[0] => return at + 1,
            _ => 1,
        };
    }
    text.len()
}

/// `[[…]]` or `[==[…]==]`: what is inside, and the length of all.
fn long_bracket(text: &[u8]) -> Option<(&[u8], usize)> {
    let level = text
        .strip_prefix(b"[")?
        .iter()
        .take_while(|b| **b == b'=')
        .count();
    if text.get(level + 1) != Some(&b'[') {
        return None;
    }
    let mut end = vec![b']'];
    end.resize(level + 1, b'=');
    end.push(b']');
    let start = level + 2;
    match memchr::memmem::find(&text[start..], &end) {
        Some(len) => Some((&text[start..start + len], start + len + end.len())),
        None => Some((&text[start..], text.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_must_be_expressions_with_keys() {
        for good in [
            "return redis.call('get', KEYS[1])",
            "local i = 1; return redis.pcall(\"SET\", KEYS[i + #ARGV[1]], ARGV[1])",
            "return redis.call('mget', KEYS[1], KEYS[2])",
            "-- redis.call('get', 'x')\nreturn 1",
            "--[[ redis.call('get', 'x') ]] return 'redis.call(\"get\", \"x\")'",
            "return [==[ redis.call('get', 'x') ]==]",
            "return redis.call('ping')",
            "return redis.call('eval', 'return 1', 0)",
            "return redis.call('nosuchcommand', 'x')",
            "return redis.call('xread', 'streams', KEYS[1], '0')",
        ] {
            assert_eq!(check_text(good.as_bytes()), None, "{good}");
        }
        for bad in [
            "return redis.call('get', 'x')",
            "local k = KEYS; return redis.call('get', k[1])",
            "return redis.call('get', ARGV[1])",
            "return redis.call('get', KEYS[1] .. KEYS[2])",
            "return redis.call('get', KEYS[1]..'x')",
            "return redis.call('mget', KEYS[1], 'x')",
            "return redis.call(ARGV[1], KEYS[1])",
            "local call = redis.call; return call('get', 'x')",
            "return redis.call('get'",
            "return redis.call 'get'",
        ] {
            assert_eq!(check_text(bad.as_bytes()), Some(BAD_SCRIPT), "{bad}");
        }
        let message = b"return redis.call('publish', KEYS[1], 'x')";
        assert_eq!(check_text(message), Some(NO_MESSAGES));
        let unpack = b"return redis.call('mget', unpack(KEYS))";
        assert_eq!(check_text(unpack), Some(BAD_SCRIPT));
        assert_eq!(check_text(b"return unpack({1})"), Some(NO_UNPACK));
    }

    #[test]
    fn no_text_is_read_past_its_end() {
        for text in [
            "'",
            "\"\\",
            "[[",
            "[=",
            "--[[",
            "--",
            "redis.call(",
            "KEYS[",
            "\\",
        ] {
            let _ = check_text(text.as_bytes());
        }
    }
}
