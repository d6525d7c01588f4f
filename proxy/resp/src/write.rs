//! Writers: commands for a node, replies for a client, in the protocol that the client speaks.
//!
//! They append to a buffer and never fail. A type that RESP2 lacks is written as Redis writes it
//! for a RESP2 client (map → flat array, null → `$-1`, double → bulk).

/// The protocol of one client, as chosen by its HELLO.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Protocol {
    #[default]
    Resp2,
    Resp3,
}

/// A command as a multibulk frame.
pub fn encode_command(out: &mut Vec<u8>, args: &[&[u8]]) {
    write_array_header(out, args.len());
    for arg in args {
        write_bulk(out, arg);
    }
}

#[inline]
pub fn write_bulk(out: &mut Vec<u8>, bytes: &[u8]) {
    write_header(out, b'$', bytes.len());
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

/// `text` without the leading `-`, with its code: `ERR no such key`. Line breaks become spaces.
pub fn write_error(out: &mut Vec<u8>, text: impl AsRef<[u8]>) {
    write_line(out, b'-', text.as_ref());
}

pub fn write_simple(out: &mut Vec<u8>, text: impl AsRef<[u8]>) {
    write_line(out, b'+', text.as_ref());
}

#[inline]
pub fn write_int(out: &mut Vec<u8>, value: i64) {
    out.push(b':');
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
    out.extend_from_slice(b"\r\n");
}

#[inline]
pub fn write_array_header(out: &mut Vec<u8>, len: usize) {
    write_header(out, b'*', len);
}

/// A map of `len` pairs follows: each key, then its value.
pub fn write_map_header(out: &mut Vec<u8>, protocol: Protocol, len: usize) {
    match protocol {
        Protocol::Resp2 => write_header(out, b'*', len * 2),
        Protocol::Resp3 => write_header(out, b'%', len),
    }
}

pub fn write_set_header(out: &mut Vec<u8>, protocol: Protocol, len: usize) {
    write_header(
        out,
        if protocol == Protocol::Resp3 {
            b'~'
        } else {
            b'*'
        },
        len,
    );
}

/// What the server says unasked: in RESP2 an array that a subscriber takes for a message.
pub fn write_push_header(out: &mut Vec<u8>, protocol: Protocol, len: usize) {
    write_header(
        out,
        if protocol == Protocol::Resp3 {
            b'>'
        } else {
            b'*'
        },
        len,
    );
}

pub fn write_null(out: &mut Vec<u8>, protocol: Protocol) {
    out.extend_from_slice(match protocol {
        Protocol::Resp2 => b"$-1\r\n".as_slice(),
        Protocol::Resp3 => b"_\r\n",
    });
}

/// The null that stands where an array would be (EXEC after a failed WATCH, BLPOP's timeout).
pub fn write_null_array(out: &mut Vec<u8>, protocol: Protocol) {
    out.extend_from_slice(match protocol {
        Protocol::Resp2 => b"*-1\r\n".as_slice(),
        Protocol::Resp3 => b"_\r\n",
    });
}

pub fn write_bool(out: &mut Vec<u8>, protocol: Protocol, value: bool) {
    out.extend_from_slice(match (protocol, value) {
        (Protocol::Resp2, false) => b":0\r\n".as_slice(),
        (Protocol::Resp2, true) => b":1\r\n",
        (Protocol::Resp3, false) => b"#f\r\n",
        (Protocol::Resp3, true) => b"#t\r\n",
    });
}

pub fn write_double(out: &mut Vec<u8>, protocol: Protocol, value: f64) {
    let text = if value.is_nan() {
        "nan".to_owned()
    } else if value.is_infinite() {
        if value > 0.0 { "inf" } else { "-inf" }.to_owned()
    } else {
        format!("{value}")
    };
    match protocol {
        Protocol::Resp2 => write_bulk(out, text.as_bytes()),
        Protocol::Resp3 => write_line(out, b',', text.as_bytes()),
    }
}

/// Text with a three-letter format (`txt`, `mkd`); RESP2 gets the text alone.
pub fn write_verbatim(out: &mut Vec<u8>, protocol: Protocol, format: [u8; 3], text: &[u8]) {
    match protocol {
        Protocol::Resp2 => write_bulk(out, text),
        Protocol::Resp3 => {
            write_header(out, b'=', text.len() + 4);
            out.extend_from_slice(&format);
            out.push(b':');
            out.extend_from_slice(text);
            out.extend_from_slice(b"\r\n");
        }
    }
}

#[inline]
fn write_header(out: &mut Vec<u8>, kind: u8, len: usize) {
    out.push(kind);
    out.extend_from_slice(itoa::Buffer::new().format(len).as_bytes());
    out.extend_from_slice(b"\r\n");
}

pub(crate) fn write_line(out: &mut Vec<u8>, kind: u8, text: &[u8]) {
    out.push(kind);
    let broken = |byte: &u8| matches!(byte, b'\r' | b'\n');
    out.extend(
        text.iter()
            .map(|byte| if broken(byte) { b' ' } else { *byte }),
    );
    out.extend_from_slice(b"\r\n");
}
