//! One word in, its expansion or its mistake out.

use std::{collections::BTreeMap, time::Instant};

use shipway_dockerfile::{Lex, Work, suggest};
use shipway_gocompat::quote;

fn env() -> BTreeMap<String, String> {
    let pairs = [
        ("A", "alpha/beta.gamma"),
        ("B", ""),
        ("C", "x y"),
        ("V", "1.2.3"),
        ("STAR", "a*b*c"),
        ("E", "été"),
    ];
    pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).into()
}

#[track_caller]
fn check(lex: Lex, word: &str, expected: &str) {
    let text = lex.word(word, &env()).map_or_else(|e| e.message, |e| e.text);
    let expected = expected
        .strip_prefix("! ")
        .map_or(expected.to_owned(), |e| format!("failed to process {}: {e}", quote(word)));
    assert_eq!(text, expected, "for {word:?}");
}

#[test]
fn plain() {
    for (word, expected) in [
        ("hello", "hello"),
        ("he'll'o w", "hello w"),
        ("'$A'", "$A"),
        ("\"$V\" \"'\"", "1.2.3 '"),
        ("\\$A \\x \\\\", "$A x \\"),
        ("\"\\$A \\x \\\" \\\\\"", "$A \\x \" \\"),
        ("end\\", "end"),
        ("$", "$"),
        ("$.", "$."),
        ("$V.$V", "1.2.3.1.2.3"),
        ("$1x", "x"),
        ("$Ax$UNSET!", "!"),
        ("${V}x", "1.2.3x"),
        ("a<<b < c", "a<<b < c"),
        ("'open", "! unexpected end of statement while looking for matching single-quote"),
        ("\"open", "! unexpected end of statement while looking for matching double-quote"),
        ("${", "! syntax error: missing '}'"),
        ("${V", "! unsupported modifier (\u{fffd}) in substitution"),
        ("${}", "! syntax error: bad substitution"),
        ("${V:}", "! syntax error: missing '}'"),
        ("${V:x}", "! unsupported modifier (:x) in substitution"),
        ("${V:#x}", "! unsupported modifier (:#) in substitution"),
    ] {
        check(Lex::new('\\'), word, expected);
    }
    check(Lex::new('`'), "C:\\x`$V", "C:\\x$V");
    check(
        Lex::new('\\').keep_unset(),
        "$V $X ${X} ${X:-y} ${X/a/b}",
        "1.2.3 $X ${X} ${X:-y} ${X/a/b}",
    );
    check(Lex::new('\\').raw_quotes().raw_escapes(), "'a' \"b\\\"\" \\c", "'a' \"b\\\"\" \\c");
    check(Lex::for_contents(), "it's \"$V\" \\$V", "it's \"1.2.3\" $V");
}

#[test]
fn operators() {
    for (word, expected) in [
        ("${V:-d}${B:-d}${U:-d}", "1.2.3dd"),
        ("${V-d}${B-d}${U-d}", "1.2.3d"),
        ("${V:+d}${B:+d}${U:+d}", "d"),
        ("${V+d}${B+d}${U+d}", "dd"),
        ("${U:-${B:-$V}}", "1.2.3"),
        ("${U:-'a b'\"$V\"}", "a b1.2.3"),
        ("${V?no}", "1.2.3"),
        ("${B?no}", ""),
        ("${B:?}", "! B: is not allowed to be empty"),
        ("${U:?}", "! U: is not allowed to be unset"),
        ("${U?set it}", "! U: set it"),
        ("${V", "! unsupported modifier (\u{fffd}) in substitution"),
        ("${V:-x", "! syntax error: missing '}'"),
    ] {
        check(Lex::new('\\'), word, expected);
    }
}

#[test]
fn patterns() {
    for (word, expected) in [
        ("${A#*/}", "beta.gamma"),
        ("${A#*a}", "lpha/beta.gamma"),
        ("${A##*a}", ""),
        ("${A##*.}", "gamma"),
        ("${A%.*}", "alpha/beta"),
        ("${A%%a*}", ""),
        ("${A%a}", "alpha/beta.gamm"),
        ("${A%%/*}", "alpha"),
        ("${A#?????/}", "beta.gamma"),
        ("${A#x}", "alpha/beta.gamma"),
        ("${STAR#a\\*}", "b*c"),
        ("${A/a/A}", "Alpha/beta.gamma"),
        ("${A//a/A}", "AlphA/betA.gAmmA"),
        ("${A/\\//-}", "alpha-beta.gamma"),
        ("${A//[.]/-}", "alpha/beta.gamma"),
        ("${A/p*t/-}", "al-a.gamma"),
        ("${A//?/x}", "xxxxxxxxxxxxxxxx"),
        ("${V//./}", "123"),
        ("${V//x*/}", "1.2.3"),
        ("${B//*/x}", "x"),
        ("${V//*/x}", "x"),
        ("${V///-}", "-1-.-2-.-3-"),
        ("${E//é/e}", "ete"),
        ("${A/a}", "! syntax error: missing '/' in ${}"),
        ("${A#\\x}", "! invalid pattern (\\x) in substitution: invalid escape '\\x'"),
        ("${A//a/$V}", "1.2.3lph1.2.3/bet1.2.3.g1.2.3mm1.2.3"),
    ] {
        check(Lex::new('\\'), word, expected);
    }
}

#[test]
fn splitting() {
    let split = |word: &str| Lex::new('\\').words(word, &env()).expect("splits");
    assert_eq!(split("a  b\t'c d' \"$C\" $C e\\ f"), ["a", "b", "c d", "x y", "x", "y", "e f"]);
    assert_eq!(split(" $B '' "), Vec::<String>::new());
    assert_eq!(split("80${U:-80} ${U:-81}/tcp"), ["80", "81/tcp"]);
    assert_eq!(split("<< EOF x"), ["<< EOF", "x"]);
}

#[test]
fn names_are_told() {
    let expanded = Lex::new('\\').word("$A ${B:-$U} ${W+x} $A", &env()).expect("expands");
    assert_eq!(expanded.matched.into_iter().collect::<Vec<_>>(), ["A", "B"]);
    assert_eq!(expanded.unmatched.into_iter().collect::<Vec<_>>(), ["U", "W"]);
}

#[test]
fn hostile_words_end_soon() {
    let n = 20_000;
    let long: BTreeMap<String, String> = [("A".to_owned(), "a".repeat(n))].into();
    let words = [
        "${A:-".repeat(n),
        format!("{}x{}", "${U:-".repeat(n), "}".repeat(n)),
        format!("{}x{}", "${U:-".repeat(90), "}".repeat(90)),
        "$A".repeat(n),
        format!("${{A//{}b/x}}", "a".repeat(n)),
        format!("${{A#{}b}}", "*a".repeat(n)),
        format!("${{A%%{}b}}", "a*".repeat(n)),
        "\"'".repeat(n),
        "\\".repeat(n),
        "<".repeat(n),
        "${A//a*/}".repeat(100),
    ];
    for word in &words {
        let start = Instant::now();
        let _ = Lex::new('\\').word(word, &long);
        let _ = Lex::new('\\').words(word, &long);
        assert!(start.elapsed().as_secs() < 20, "{}… took {:?}", &word[..20], start.elapsed());
    }
    assert!(Lex::new('\\').word(&words[3], &long).is_err());
}

#[test]
fn all_words_of_a_build_share_their_work() {
    let long: BTreeMap<String, String> = [("A".to_owned(), "a".repeat(1000))].into();
    let expanded = |work: &Work, word: &str| {
        (0..10_000).take_while(|_| Lex::new('\\').part_of(work).word(word, &long).is_ok()).count()
    };
    assert!(expanded(&Work::of(3_000_000), "${A//*a*a*a*b/}") < 3000);
    assert!(expanded(&Work::of(1 << 20), "$A") < 200, "results count, too");
    assert_eq!(expanded(&Work::of(10_000), "plain"), 10_000 / 6);
    let work = Work::default();
    assert_eq!(expanded(&work, "$A"), 10_000);
    work.stop();
    assert_eq!(expanded(&work, "plain"), 0);
}

#[test]
fn suggestions_are_for_short_words_among_few() {
    assert_eq!(suggest("stge", ["stage", "base"], true).as_deref(), Some("stage"));
    // Compared, these would take hours.
    let (word, name) = ("b".repeat(1 << 20), "a".repeat(1 << 20));
    assert_eq!(suggest(&word, [&*name], true), None);
    let many =
        std::iter::repeat_n("other", 1000).chain(std::iter::from_fn(|| panic!("one too many")));
    assert_eq!(suggest("short", many, true), None);
}
