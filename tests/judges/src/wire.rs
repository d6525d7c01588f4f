//! RESP as a judge reads it: a blocking connection and replies as values.
//!
//! It shares no code with the product, so that both can't be wrong in the same way.

use std::{
    fmt,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use anyhow::{Context, bail};

/// No command of a judge takes longer on a slow machine; a reply that is missing must be noticed.
const REPLY_LIMIT: Duration = Duration::from_secs(20);
/// What a judge asks for is small.
const BULK_MAX: usize = 64 << 20;
const DEPTH_MAX: u32 = 32;

/// A command: its name and arguments.
pub type Words = Vec<Vec<u8>>;

/// A reply, with the type that it had on the wire.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Value {
    /// `$-1`, `*-1` or `_`.
    Null,
    Status(Vec<u8>),
    Error(Vec<u8>),
    Number(i64),
    Bulk(Vec<u8>),
    /// As text, so that its exact form counts.
    Double(Vec<u8>),
    Boolean(bool),
    Big(Vec<u8>),
    Verbatim(Vec<u8>),
    Array(Vec<Value>),
    Set(Vec<Value>),
    Map(Vec<(Value, Value)>),
    Push(Vec<Value>),
}

impl Value {
    /// The elements of an array, a set or a push.
    pub fn items(&self) -> &[Self] {
        match self {
            Self::Array(items) | Self::Set(items) | Self::Push(items) => items,
            _ => &[],
        }
    }

    /// The bytes of whatever is text.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Status(b)
            | Self::Error(b)
            | Self::Bulk(b)
            | Self::Double(b)
            | Self::Big(b)
            | Self::Verbatim(b) => b,
            _ => b"",
        }
    }

    pub fn is_error(&self, code: &str) -> bool {
        matches!(self, Self::Error(text) if text.starts_with(code.as_bytes()))
    }
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("nil"),
            Self::Status(text) => write!(f, "+{}", text.escape_ascii()),
            Self::Error(text) => write!(f, "-{}", text.escape_ascii()),
            Self::Number(number) => write!(f, ":{number}"),
            Self::Bulk(bytes) => write!(f, "\"{}\"", shortened(bytes)),
            Self::Double(text) => write!(f, ",{}", text.escape_ascii()),
            Self::Boolean(is) => write!(f, "#{is}"),
            Self::Big(text) => write!(f, "({}", text.escape_ascii()),
            Self::Verbatim(text) => write!(f, "={}", shortened(text)),
            Self::Array(items) => f.debug_list().entries(items).finish(),
            Self::Set(items) => f.debug_set().entries(items).finish(),
            Self::Map(pairs) => f.debug_map().entries(pairs.iter().cloned()).finish(),
            Self::Push(items) => {
                f.write_str(">")?;
                f.debug_list().entries(items).finish()
            }
        }
    }
}

/// Long values are told apart by their length and beginning.
fn shortened(bytes: &[u8]) -> String {
    const SHOWN: usize = 120;
    match bytes.get(..SHOWN) {
        Some(head) => format!("{}… {} bytes", head.escape_ascii(), bytes.len()),
        None => bytes.escape_ascii().to_string(),
    }
}

/// A command as one would type it.
pub fn show(words: &[Vec<u8>]) -> String {
    let shown = words.iter().map(|word| {
        let plain = !word.is_empty() && word.iter().all(u8::is_ascii_graphic);
        let text = shortened(word);
        if plain { text } else { format!("\"{text}\"") }
    });
    shown.collect::<Vec<_>>().join(" ")
}

/// Words of text, for commands that are written down in a judge.
pub fn words(text: &[&str]) -> Words {
    text.iter().map(|word| word.as_bytes().to_vec()).collect()
}

/// Appends a command in the form that clients use.
pub fn encode<W: AsRef<[u8]>>(out: &mut Vec<u8>, words: &[W]) {
    out.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        let word = word.as_ref();
        out.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        out.extend_from_slice(word);
        out.extend_from_slice(b"\r\n");
    }
}

/// A blocking connection.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
}

impl Connection {
    /// # Errors
    /// It does not connect.
    pub fn open(address: &str) -> anyhow::Result<Self> {
        let stream =
            TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(REPLY_LIMIT))?;
        stream.set_write_timeout(Some(REPLY_LIMIT))?;
        let reader = BufReader::new(stream.try_clone()?);
        Ok(Self { stream, reader })
    }

    /// # Errors
    /// It does not connect, or refuses RESP3.
    pub fn open_resp3(address: &str) -> anyhow::Result<Self> {
        let mut connection = Self::open(address)?;
        match connection.call(&["HELLO", "3"])? {
            Value::Map(_) => Ok(connection),
            other => bail!("HELLO 3 at {address}: {other:?}"),
        }
    }

    /// # Errors
    /// The peer has closed or does not read.
    pub fn send(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.stream.write_all(bytes).context("send")
    }

    /// One command and its reply.
    ///
    /// # Errors
    /// No reply comes.
    pub fn call<W: AsRef<[u8]>>(&mut self, words: &[W]) -> anyhow::Result<Value> {
        let mut frame = Vec::new();
        encode(&mut frame, words);
        self.send(&frame)?;
        self.read()
    }

    /// The next reply.
    ///
    /// # Errors
    /// None comes in time, the peer has closed, or it is no RESP.
    pub fn read(&mut self) -> anyhow::Result<Value> {
        self.value(0)
    }

    /// For another limit than that of replies: where a push is awaited, or nothing at all.
    ///
    /// # Errors
    /// The system refuses.
    pub fn set_read_limit(&mut self, limit: Duration) -> anyhow::Result<()> {
        self.stream.set_read_timeout(Some(limit))?;
        Ok(())
    }

    fn line(&mut self) -> anyhow::Result<Vec<u8>> {
        let mut line = Vec::new();
        self.reader
            .read_until(b'\n', &mut line)
            .context("read a reply")?;
        match line.strip_suffix(b"\r\n") {
            Some(text) if !text.is_empty() => Ok(text.to_vec()),
            _ if line.is_empty() => bail!("the peer has closed"),
            _ => bail!("no RESP: {:?}", line.escape_ascii().to_string()),
        }
    }

    fn value(&mut self, depth: u32) -> anyhow::Result<Value> {
        let line = self.line()?;
        let (kind, text) = (line[0], &line[1..]);
        Ok(match kind {
            b'+' => Value::Status(text.to_vec()),
            b'-' => Value::Error(text.to_vec()),
            b':' => Value::Number(number(text)?),
            b',' => Value::Double(text.to_vec()),
            b'#' => Value::Boolean(text == b"t"),
            b'(' => Value::Big(text.to_vec()),
            b'_' => Value::Null,
            b'$' | b'=' | b'!' => self.bulk(kind, number(text)?)?,
            b'*' | b'~' | b'>' | b'%' => self.aggregate(kind, number(text)?, depth)?,
            _ => bail!("no RESP: {:?}", line.escape_ascii().to_string()),
        })
    }

    fn bulk(&mut self, kind: u8, length: i64) -> anyhow::Result<Value> {
        if length == -1 {
            return Ok(Value::Null);
        }
        let length = usize::try_from(length).context("a length")?;
        if length > BULK_MAX {
            bail!("a reply of {length} bytes");
        }
        let mut bytes = vec![0; length + 2];
        self.reader.read_exact(&mut bytes).context("read a bulk")?;
        if bytes.split_off(length) != b"\r\n" {
            bail!("a bulk of {length} bytes does not end where it should");
        }
        Ok(match kind {
            b'$' => Value::Bulk(bytes),
            b'!' => Value::Error(bytes),
            _ => Value::Verbatim(bytes),
        })
    }

    fn aggregate(&mut self, kind: u8, count: i64, depth: u32) -> anyhow::Result<Value> {
        if count == -1 {
            return Ok(Value::Null);
        }
        if depth > DEPTH_MAX {
            bail!("a reply nested deeper than {DEPTH_MAX}");
        }
        if kind == b'%' {
            let mut pairs = Vec::new();
            for _ in 0..count {
                pairs.push((self.value(depth + 1)?, self.value(depth + 1)?));
            }
            return Ok(Value::Map(pairs));
        }
        let mut items = Vec::new();
        for _ in 0..count {
            items.push(self.value(depth + 1)?);
        }
        Ok(match kind {
            b'*' => Value::Array(items),
            b'~' => Value::Set(items),
            _ => Value::Push(items),
        })
    }
}

fn number(text: &[u8]) -> anyhow::Result<i64> {
    let text = std::str::from_utf8(text).context("a number")?;
    text.parse()
        .with_context(|| format!("{text:?} is no number"))
}
