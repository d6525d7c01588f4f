//! The text of a selector as words, and back: white space parts them, quotes hold them together.
//!
//! Invariant: `split(quote(a) + " " + quote(b))` gives `a` and `b` again.

/// `None`: quotes that are not closed, or a word that goes on behind its closing quote.
pub(crate) fn split(line: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut words = Vec::new();
    let mut rest = line;
    loop {
        rest = rest.trim_ascii_start();
        if rest.is_empty() || rest[0] == 0 {
            return Some(words);
        }
        let (word, behind) = word(rest)?;
        words.push(word);
        rest = behind;
    }
}

fn word(line: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let mut word = Vec::new();
    let mut rest = line;
    loop {
        match rest {
            [] => return Some((word, rest)),
            [b' ' | b'\n' | b'\r' | b'\t' | 0, ..] => return Some((word, rest)),
            [quote @ (b'"' | b'\''), inside @ ..] => {
                rest = quoted(*quote, inside, &mut word)?;
                // A closing quote ends the word.
                let ends = rest.first().is_none_or(|&byte| is_space(byte));
                return ends.then_some((word, rest));
            }
            [byte, behind @ ..] => {
                word.push(*byte);
                rest = behind;
            }
        }
    }
}

fn quoted<'a>(quote: u8, mut rest: &'a [u8], word: &mut Vec<u8>) -> Option<&'a [u8]> {
    loop {
        let (byte, behind) = rest.split_first()?;
        rest = behind;
        match *byte {
            0 => return None,
            byte if byte == quote => return Some(rest),
            b'\\' if quote == b'\'' => {
                let escaped = rest.first() == Some(&b'\'');
                word.push(if escaped { b'\'' } else { b'\\' });
                rest = &rest[usize::from(escaped)..];
            }
            b'\\' => rest = escaped(rest, word)?,
            byte => word.push(byte),
        }
    }
}

fn escaped<'a>(rest: &'a [u8], word: &mut Vec<u8>) -> Option<&'a [u8]> {
    if let [b'x', high, low, behind @ ..] = rest
        && let (Some(high), Some(low)) = (hex(*high), hex(*low))
    {
        word.push(high << 4 | low);
        return Some(behind);
    }
    let (byte, behind) = rest.split_first()?;
    word.push(match byte {
        b'n' => b'\n',
        b'r' => b'\r',
        b't' => b'\t',
        b'b' => 8,
        b'a' => 7,
        byte => *byte,
    });
    Some(behind)
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|digit| digit as u8)
}

/// As it is, or in quotes if it would be read as something else.
pub(crate) fn quote(word: &str) -> String {
    let plain = |c: char| !is_space_char(c) && !"\"'\0".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    let mut quoted = String::from("\"");
    for c in word.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_ascii_control() => quoted.push_str(&format!("\\x{:02x}", c as u32)),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

fn is_space_char(c: char) -> bool {
    u8::try_from(c).is_ok_and(is_space)
}

/// What C calls a space.
pub(crate) fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | 9..=13)
}
