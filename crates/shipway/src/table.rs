//! Tables of tab-separated cells, aligned with tabs as Go's `tabwriter` does, so that what reads
//! `buildctl`'s output reads ours.

/// Width of a tab.
const TAB: usize = 8;

/// Aligns lines of cells: each run of lines that have a column in common gets one width for it. The
/// last cell of a line is not a column.
pub(crate) fn align(text: &str) -> String {
    let lines: Vec<Vec<&str>> = text.split('\n').map(|line| line.split('\t').collect()).collect();
    let mut out = String::new();
    block(&lines, &mut Vec::new(), &mut out);
    out.pop();
    out
}

fn width(cell: &str) -> usize {
    cell.chars().count()
}

fn block(lines: &[Vec<&str>], widths: &mut Vec<usize>, out: &mut String) {
    let column = widths.len();
    let mut start = 0;
    while start < lines.len() {
        let has = |line: &&Vec<&str>| column + 1 < line.len();
        let plain = lines[start..].iter().take_while(|line| !has(line)).count();
        print(&lines[start..start + plain], widths, out);
        start += plain;
        let shared = lines[start..].iter().take_while(has).count();
        if shared > 0 {
            let rows = &lines[start..start + shared];
            let widest = rows.iter().map(|line| width(line[column]) + 1).max().unwrap_or(1);
            widths.push(widest.div_ceil(TAB) * TAB);
            block(rows, widths, out);
            widths.pop();
            start += shared;
        }
    }
}

fn print(lines: &[Vec<&str>], widths: &[usize], out: &mut String) {
    for line in lines {
        for (i, cell) in line.iter().enumerate() {
            out.push_str(cell);
            if let Some(column) = widths.get(i) {
                out.extend(std::iter::repeat_n(
                    '\t',
                    column.saturating_sub(width(cell)).div_ceil(TAB),
                ));
            }
        }
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_share_a_width_while_lines_have_them() {
        assert_eq!(align("ID\tSIZE\nabcdefgh\t1\nx\t2\n"), "ID\t\tSIZE\nabcdefgh\t1\nx\t\t2\n");
        assert_eq!(align("a\tb\n\nlonger-than-eight\tc\n"), "a\tb\n\nlonger-than-eight\tc\n");
        assert_eq!(
            align("Labels:\n\tk:\tv\n\tlonger.key:\tw\n"),
            "Labels:\n\tk:\t\tv\n\tlonger.key:\tw\n"
        );
    }
}
