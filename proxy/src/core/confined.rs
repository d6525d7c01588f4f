//! Scripts of accounts that may not do everything: each runs at the node inside a program of the
//! proxy, which asks the account's rules before every call.
//!
//! Invariant: the account's text is data to the engine until that program compiles it, with every name
//! by which it could reach the engine's own functions bound to the program's. An engine in which there
//! may be other ways is refused by the program itself. So a script can do what its account can do
//! without one, by the keys and flags that the engine finds in each call.
//!
//! The digest by which the client calls its script is that of its own text, and is known to this
//! process; the node sees another.

use std::fmt::Write as _;
use std::sync::{Arc, LazyLock};

use slotmesh_acl::User;
use slotmesh_command::{Command, lookup};
use slotmesh_resp::{Args, Parsed, RequestParser, write};

use super::Core;
use super::client::Client;
use super::script_flags::first_line;
use super::scripts::parse_sha;
use super::spec::Request;

pub(super) const NO_SCRIPT: &str = "NOSCRIPT No matching script. Please use EVAL.";

/// The program without what only its readers need.
static PROGRAM: LazyLock<String> = LazyLock::new(|| {
    let lines = include_str!("confined/confined.lua").lines().map(str::trim);
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with("--"));
    lines.collect::<Vec<_>>().join("\n")
});

/// A command that goes to the node instead of the client's.
#[derive(Debug)]
pub(super) struct Confined {
    pub(super) command: &'static Command,
    frame: Vec<u8>,
    args: Args,
}

impl Confined {
    pub(super) fn request(&self) -> Request<'_> {
        Request {
            frame: &self.frame,
            args: &self.args,
        }
    }
}

impl Core {
    /// True if scripts of this client are confined.
    pub(super) fn confines(&self, slot: u32) -> bool {
        let client = self.sessions.get(slot);
        client
            .and_then(Client::limited)
            .is_some_and(|user| !super::accounts::may_script(user))
    }

    /// What goes to the node instead of a script of an account with few rights. `Err`: why nothing does.
    pub(super) fn confine(
        &mut self,
        slot: u32,
        command: &'static Command,
        request: Request<'_>,
    ) -> Result<Option<Confined>, String> {
        let (by_sha, name) = match command.name {
            "eval" | "eval_ro" => (false, command.name),
            "evalsha" => (true, "eval"),
            "evalsha_ro" => (true, "eval_ro"),
            _ => return Ok(None),
        };
        if !self.confines(slot) {
            return Ok(None);
        }
        if let Some(text) = self.script_refusal(command, request) {
            return Err(text.to_owned());
        }
        let kept;
        let text = if by_sha {
            let known = parse_sha(request.arg(1)).and_then(|sha| self.scripts.text(&sha));
            kept = known.ok_or(NO_SCRIPT)?;
            &kept[..]
        } else {
            self.remember_script(request.arg(1));
            request.arg(1)
        };
        let Some((command, rules)) = lookup(name.as_bytes()).zip(self.rules_in_lua(slot)) else {
            return Ok(None);
        };
        let text = wrap(text, &rules);
        let mut words = vec![name.as_bytes(), &text];
        words.extend((2..request.len()).map(|at| request.arg(at)));
        let (mut frame, mut args) = (
            Vec::with_capacity(request.frame.len() + text.len()),
            Args::new(),
        );
        write::encode_command(&mut frame, &words);
        match RequestParser::new().parse(&frame, &mut args) {
            Ok(Parsed::Complete { .. }) => Ok(Some(Confined {
                command,
                frame,
                args,
            })),
            _ => Err("ERR slotmesh: the script is too large".to_owned()),
        }
    }

    /// The rules of the client's account, written once for each login.
    fn rules_in_lua(&mut self, slot: u32) -> Option<Arc<str>> {
        let extra = self.sessions.get_mut(slot)?.extra_mut();
        let user = extra.account.as_ref()?;
        let rules = extra.rules_in_lua.get_or_insert_with(|| rules(user).into());
        Some(Arc::clone(rules))
    }
}

/// The script that checks and then runs `body`. Its first line says the same as the body's.
fn wrap(body: &[u8], rules: &str) -> Vec<u8> {
    let line = first_line(body).unwrap_or_default();
    let mut text = Vec::with_capacity(body.len() + rules.len() + PROGRAM.len() + 64);
    if !line.is_empty() {
        text.extend_from_slice(line);
        text.push(b'\n');
    }
    text.extend_from_slice(rules.as_bytes());
    text.extend_from_slice(b"local body=");
    // With the end of its first line, so that lines are counted as the author does.
    quote(&body[line.len()..], &mut text);
    text.push(b'\n');
    text.extend_from_slice(PROGRAM.as_bytes());
    text
}

/// Bytes as a string of Lua.
fn quote(bytes: &[u8], out: &mut Vec<u8>) {
    out.push(b'"');
    for &byte in bytes {
        match byte {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', byte]),
            b'\n' => out.extend_from_slice(b"\\n"),
            0..0x20 | 0x7f => out.extend_from_slice(format!("\\{byte:03}").as_bytes()),
            _ => out.push(byte),
        }
    }
    out.push(b'"');
}

fn quoted(text: &str) -> String {
    let mut out = Vec::new();
    quote(text.as_bytes(), &mut out);
    String::from_utf8(out).unwrap_or_default()
}

/// `local rules={{commands=" get set ",keys={{"a:*",true,false}},channels=true}}`
fn rules(user: &User) -> String {
    let mut out = "local rules={".to_owned();
    for one in user.script_rules(super::accounts::is_callable) {
        let commands = format!(" {} ", one.commands.join(" "));
        let _ = write!(out, "{{commands={},keys=", quoted(&commands));
        match one.keys {
            None => out.push_str("true"),
            Some(keys) => {
                let keys = keys.iter().map(|(pattern, rights)| {
                    format!("{{{},{},{}}}", quoted(pattern), rights.read, rights.write)
                });
                let _ = write!(out, "{{{}}}", keys.collect::<Vec<_>>().join(","));
            }
        }
        out.push_str(",channels=");
        match one.channels {
            None => out.push_str("true"),
            Some(all) => {
                let all: Vec<String> = all.iter().map(|one| quoted(one)).collect();
                let _ = write!(out, "{{{}}}", all.join(","));
            }
        }
        out.push_str("},");
    }
    out.push_str("}\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_stays_one_string_whatever_is_in_it() {
        let body: Vec<u8> = (0..=255).chain(*b"\"]]--\\\"").collect();
        let mut text = Vec::new();
        quote(&body, &mut text);
        let inside = &text[1..text.len() - 1];
        let mut at = 0;
        while at < inside.len() {
            assert!(inside[at] != b'"' && inside[at] >= b' ', "at {at}");
            at += if inside[at] == b'\\' { 2 } else { 1 };
        }
        assert_eq!(at, inside.len(), "the closing quote is not escaped");
    }

    #[test]
    fn the_flags_of_a_script_stay_in_front() {
        let text = wrap(b"#!lua flags=no-writes\nreturn 1", "local rules={}\n");
        let text = String::from_utf8(text).unwrap();
        let want = "#!lua flags=no-writes\nlocal rules={}\nlocal body=\"\\nreturn 1\"\n";
        assert!(text.starts_with(want), "{text}");
        let text = wrap(b"#!lua", "");
        assert!(
            text.starts_with(b"local body=\"#!lua\"\n"),
            "not a first line"
        );
    }
}
