//! A file of lost writes as commands: read from the agent that keeps it, one after the other.
//!
//! Invariant: a command is given out once, with the database that it is for, and a file that is not
//! the one that was recorded is called so at its end.

use std::fmt::Write;

use anyhow::{Context, bail};
use sha2::{Digest, Sha256};
use slotmesh_proto::{
    agent::v1::{
        ReadLostWritesRequest, ReadLostWritesResponse, agent_service_client::AgentServiceClient,
    },
    task::v1::LostWrites,
};
use slotmesh_resp::{Args, Parsed, RequestParser};
use tonic::Streaming;

use crate::failure::Failure;

/// Not data: how a primary keeps its stream alive and in order. Not counted by the agent either.
const UPKEEP: [&str; 4] = ["PING", "REPLCONF", "MULTI", "EXEC"];

/// One write that was lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LostCommand {
    /// Counts from 1 in its file.
    pub number: u64,
    pub database: u32,
    pub arguments: Vec<Vec<u8>>,
}

impl LostCommand {
    /// In capitals.
    pub fn name(&self) -> String {
        let name = self.arguments.first().map(Vec::as_slice);
        String::from_utf8_lossy(name.unwrap_or_default()).to_ascii_uppercase()
    }

    /// What commands of this name take for keys; most have one, and it comes first.
    pub fn keys(&self) -> impl Iterator<Item = &[u8]> {
        let (step, most) = match self.name().as_str() {
            "MSET" | "MSETNX" => (2, usize::MAX),
            "DEL" | "UNLINK" | "PFMERGE" | "SINTERSTORE" | "SUNIONSTORE" | "SDIFFSTORE" => {
                (1, usize::MAX)
            }
            "RENAME" | "RENAMENX" | "COPY" | "SMOVE" | "LMOVE" | "RPOPLPUSH" => (1, 2),
            "FLUSHALL" | "FLUSHDB" | "SWAPDB" | "FUNCTION" | "SCRIPT" | "PUBLISH" | "SPUBLISH" => {
                (1, 0)
            }
            _ => (1, 1),
        };
        let keys = self.arguments.iter().skip(1).step_by(step).take(most);
        keys.map(Vec::as_slice)
    }

    /// On one line, quoted where a shell would need it.
    pub fn line(&self) -> String {
        let words: Vec<String> = self.arguments.iter().map(|a| word(a)).collect();
        words.join(" ")
    }
}

fn word(bytes: &[u8]) -> String {
    let plain = |b: &u8| b.is_ascii_graphic() && !b"\"'\\".contains(b);
    if !bytes.is_empty() && bytes.iter().all(plain) {
        return String::from_utf8_lossy(bytes).into_owned();
    }
    let mut text = String::from("\"");
    for byte in bytes {
        match byte {
            b'"' => text.push_str("\\\""),
            b'\\' => text.push_str("\\\\"),
            b'\n' => text.push_str("\\n"),
            b'\r' => text.push_str("\\r"),
            b'\t' => text.push_str("\\t"),
            b' '..=b'~' => text.push(char::from(*byte)),
            _ => drop(write!(text, "\\x{byte:02x}")),
        }
    }
    text.push('"');
    text
}

/// Commands out of chunks of bytes.
#[derive(Debug, Default)]
pub struct Decoder {
    pending: Vec<u8>,
    number: u64,
    database: u32,
}

impl Decoder {
    /// The commands that are whole with these bytes.
    ///
    /// # Errors
    /// When the bytes are no commands.
    pub fn feed(&mut self, chunk: &[u8]) -> anyhow::Result<Vec<LostCommand>> {
        self.pending.extend_from_slice(chunk);
        let (mut at, mut args, mut found) = (0, Args::new(), Vec::new());
        while at < self.pending.len() {
            let parsed = RequestParser::new().parse(&self.pending[at..], &mut args);
            match parsed.context("the file does not hold commands")? {
                Parsed::Complete { consumed } => {
                    let frame = &self.pending[at..at + consumed];
                    let arguments = args.iter(frame).map(<[u8]>::to_vec).collect();
                    found.extend(Self::command(
                        &mut self.number,
                        &mut self.database,
                        arguments,
                    )?);
                    at += consumed;
                }
                Parsed::Empty { consumed } => at += consumed,
                Parsed::Incomplete { .. } => break,
                Parsed::Inline { .. } => bail!("the file does not hold commands"),
            }
        }
        self.pending.drain(..at);
        Ok(found)
    }

    fn command(
        number: &mut u64,
        database: &mut u32,
        arguments: Vec<Vec<u8>>,
    ) -> anyhow::Result<Option<LostCommand>> {
        let mut command = LostCommand {
            number: 0,
            database: *database,
            arguments,
        };
        let name = command.name();
        if name == "SELECT" {
            let index = command.arguments.get(1).map(Vec::as_slice);
            let index = String::from_utf8_lossy(index.unwrap_or_default());
            *database = index.parse().context("the file names no database")?;
            return Ok(None);
        }
        if UPKEEP.contains(&name.as_str()) {
            return Ok(None);
        }
        *number += 1;
        command.number = *number;
        Ok(Some(command))
    }

    /// # Errors
    /// When the bytes ended within a command.
    pub fn end(&self) -> anyhow::Result<()> {
        match self.pending.is_empty() {
            true => Ok(()),
            false => bail!("the file ends within a command"),
        }
    }
}

/// A file on its way from its agent.
#[derive(Debug)]
pub struct LostFile {
    stream: Streaming<ReadLostWritesResponse>,
    decoder: Decoder,
    digest: Sha256,
    sha256: String,
}

impl LostFile {
    /// Asks the agent that keeps it.
    ///
    /// # Errors
    /// When the agent can't be reached, or does not keep it any more.
    pub async fn open(lost: &LostWrites) -> Result<Self, Failure> {
        let (address, host) = (&lost.agent_address, &lost.host_id);
        if address.is_empty() {
            return Err(Failure::RefusedHere(format!(
                "host {host}, which keeps the file, has no agent now: start it, then try again"
            )));
        }
        let client = AgentServiceClient::connect(format!("http://{address}")).await;
        let mut client = client.with_context(|| {
            format!("connect to the agent of host {host} at {address}, which keeps the file")
        })?;
        let request = ReadLostWritesRequest {
            file: lost.file.clone(),
        };
        let stream = client.read_lost_writes(request).await;
        Ok(Self {
            stream: stream.map_err(|s| Failure::from_status(&s))?.into_inner(),
            decoder: Decoder::default(),
            digest: Sha256::new(),
            sha256: lost.sha256.clone(),
        })
    }

    /// The next commands; `None` at the end of the file that was recorded.
    ///
    /// # Errors
    /// When the file can't be read, or is not what was recorded.
    pub async fn next(&mut self) -> Result<Option<Vec<LostCommand>>, Failure> {
        let chunk = self.stream.message().await;
        match chunk.map_err(|s| Failure::from_status(&s))? {
            Some(response) => {
                self.digest.update(&response.chunk);
                Ok(Some(self.decoder.feed(&response.chunk)?))
            }
            None => {
                self.decoder.end()?;
                if hex::encode(self.digest.finalize_reset()) != self.sha256 {
                    let why = "the file is not the one that was recorded: somebody has changed it";
                    return Err(Failure::RefusedHere(why.to_owned()));
                }
                Ok(None)
            }
        }
    }
}

/// Whether `text` is as `pattern` says: `*` is anything, `?` any one byte.
pub fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, t));
                p += 1;
            }
            Some(c) if *c == b'?' || *c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((after, from)) => {
                    star = Some((after, from + 1));
                    (p, t) = (after, from + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use slotmesh_resp::write::encode_command;

    use super::*;

    fn file(commands: &[&[&[u8]]]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for command in commands {
            encode_command(&mut bytes, command);
        }
        bytes
    }

    #[test]
    fn commands_come_out_whole_numbered_and_with_their_database_in_pieces_of_any_size() {
        let bytes = file(&[
            &[b"SELECT", b"3"],
            &[b"set", b"a", b"one two"],
            &[b"PING"],
            &[b"SELECT", b"0"],
            &[b"MSET", b"b", b"1", b"c", b"\xff\n"],
        ]);
        for size in [1, 7, 1_000] {
            let mut decoder = Decoder::default();
            let mut all = Vec::new();
            for piece in bytes.chunks(size) {
                all.extend(decoder.feed(piece).unwrap());
            }
            decoder.end().unwrap();
            let shown: Vec<_> = all
                .iter()
                .map(|c| (c.number, c.database, c.line()))
                .collect();
            assert_eq!(
                shown,
                [
                    (1, 3, "set a \"one two\"".to_owned()),
                    (2, 0, "MSET b 1 c \"\\xff\\n\"".to_owned()),
                ]
            );
            assert_eq!(all[1].keys().collect::<Vec<_>>(), [b"b", b"c"]);
        }
        let mut cut = Decoder::default();
        cut.feed(&bytes[..bytes.len() - 1]).unwrap();
        assert!(cut.end().is_err());
    }

    #[test]
    fn a_pattern_matches_as_it_says() {
        for (pattern, text, expected) in [
            ("*", "", true),
            ("user:*", "user:1", true),
            ("user:*", "users:1", false),
            ("*:1", "a:2:1", true),
            ("u?er", "user", true),
            ("u?er", "uer", false),
            ("a*b*c", "axxbxbc", true),
            ("", "x", false),
        ] {
            let found = matches(pattern.as_bytes(), text.as_bytes());
            assert_eq!(found, expected, "{pattern} {text}");
        }
    }
}
