"""Write the demo's instruction rows: train.jsonl (320 rows) and heldout.jsonl (40 rows), half English, half Chinese.

Each row gives one sentence that orders something for somebody somewhere, and asks for it as one short line:

    Please send three apples to Mia in Oslo, thank you!   ->   Mia | Oslo | 3 apples
    请给杭州的小林寄三个苹果，谢谢！                      ->   小林 | 杭州 | 3个苹果

The answer is read off the question, so whoever learns it has learnt to look there: no held-out person, city or
article occurs in a training row, and no question or answer occurs twice. The same seed writes the same bytes.

    python rows.py [folder]
"""

import json
import random
import sys
from pathlib import Path

SEED = 20
SIZES = {"train": 160, "heldout": 20}  # rows per language

INSTRUCTION = {
    "en": "Sum up the order in one line: person | city | goods",
    "zh": "把订单写成一行：人名 | 城市 | 物品",
}
TEMPLATES = {
    "en": [
        "Please send {count} {goods} to {person} in {city}, thank you!",
        "{person} would like {count} {goods} delivered to {city}.",
        "We have {count} {goods} ready for {person}, who lives in {city}.",
        "Could you bring {count} {goods} to {city}? {person} is looking forward to them.",
        "In {city}, {person} is waiting for {count} {goods}.",
        "{count} {goods} for {person}, please. The parcel goes to {city}.",
    ],
    "zh": [
        "请给{city}的{person}寄{count}{goods}，谢谢！",
        "{person}想订{count}{goods}，送到{city}。",
        "{person}住在{city}，这次要{count}{goods}。",
        "麻烦准备{count}{goods}，收件人是{person}，地址在{city}。",
        "{city}的{person}正等着{count}{goods}，请早点发货。",
        "{count}{goods}，寄到{city}，交给{person}，辛苦了！",
    ],
}
NUMBERS = {  # from two on
    "en": "two three four five six seven eight nine ten eleven twelve",
    "zh": "两 三 四 五 六 七 八 九 十 十一 十二",
}
# The first line of each is for training, the second for the held-out rows; Chinese goods begin with their measure word.
PERSONS = {
    "en": (
        "Mia Leo Emma Noah Olivia Liam Sofia Lucas Hannah Peter Alice Daniel Grace Henry Julia Oscar Nina Victor Clara "
        "Simon Laura Felix Anna Thomas Eva Martin Rosa Paul Irene George Lily Hugo Sarah Adam Maria Robert Helen Frank",
        "Bruno Ingrid Walter Naomi Stella Edwin Tessa Gilbert Amelia Conrad Fiona Jasper",
    ),
    "zh": (
        "小林 小王 小张 小陈 小杨 小周 小吴 小徐 小孙 小马 小朱 小胡 老李 老刘 老赵 老黄 老郭 老何 老高 老罗 "
        "王芳 李梅 张伟 刘云 陈静 杨光 赵雪 黄英 周文 吴丽 徐明 孙玲 马平 朱红 胡勇 林海 何青 高山 罗宁 郭强",
        "小谢 小唐 小许 老冯 老邓 老曹 曾欣 彭飞 萧然 田甜 董悦 袁清",
    ),
}
CITIES = {
    "en": (
        "Oslo, Paris, Rome, Berlin, Madrid, Lisbon, Vienna, Prague, Dublin, London, Athens, Warsaw, Boston, Chicago, "
        "Seattle, Denver, Toronto, Sydney, Tokyo, Seoul, Cairo, Lima, Havana, Geneva, Milan, Munich, Helsinki, Austin",
        "Budapest, Stockholm, Montreal, Nairobi, Brussels, Melbourne, Kyoto, Zurich, Dallas, Naples",
    ),
    "zh": (
        "杭州 上海 北京 广州 深圳 成都 南京 武汉 西安 重庆 天津 苏州 长沙 青岛 大连 厦门 宁波 昆明 济南 合肥 "
        "福州 郑州 沈阳 无锡 珠海 桂林 海口 洛阳",
        "哈尔滨 贵阳 兰州 扬州 温州 烟台 太原 三亚 绍兴 南昌",
    ),
}
GOODS = {
    "en": (
        "apples, lemons, books, candles, umbrellas, pencils, teapots, cups, chairs, lamps, blankets, pillows, scarves, "
        "hats, gloves, notebooks, baskets, flowers, cakes, cookies, oranges, melons, spoons, plates, mirrors, clocks, "
        "postcards, puzzles, kites, balloons, towels, bottles, brushes, guitars, drums, bicycles",
        "pears, violins, backpacks, sweaters, tomatoes, cushions, stamps, vases, mangoes, bracelets, carpets, lanterns",
    ),
    "zh": (
        "个苹果 个橙子 个西瓜 个书包 个枕头 个花瓶 个杯子 个篮球 个蛋糕 个闹钟 把雨伞 把椅子 把梳子 把吉他 把勺子 "
        "本词典 本相册 本小说 盒茶叶 盒饼干 盒蜡烛 盒月饼 条围巾 条毛巾 条毯子 支铅笔 支钢笔 件毛衣 件衬衫 双袜子 "
        "双手套 张地图 张书桌 盏台灯 瓶蜂蜜 瓶果汁 袋大米 袋核桃",
        "个菠萝 个风筝 个足球 把茶壶 把剪刀 本日历 盒巧克力 条裙子 支毛笔 件外套 双拖鞋 瓶酸奶 袋红枣",
    ),
}


def names(text: str) -> list[str]:
    """The names in a line: those parted by commas where it has any, else by blanks."""
    return text.split(", ") if ", " in text else text.split()


def rows(language: str, part: str, rng: random.Random) -> list[dict[str, str]]:
    """The rows of one part in one language, every answer a different one."""
    which = list(SIZES).index(part)
    persons, cities, goods = (names(table[language][which]) for table in (PERSONS, CITIES, GOODS))
    found: dict[str, dict[str, str]] = {}
    while len(found) < SIZES[part]:
        person, city, article = rng.choice(persons), rng.choice(cities), rng.choice(goods)
        number, count = rng.choice(list(enumerate(NUMBERS[language].split(), 2)))
        template = TEMPLATES[language][len(found) % len(TEMPLATES[language])]
        text = template.format(person=person, city=city, count=count, goods=article)
        blank = " " if language == "en" else ""
        answer = f"{person} | {city} | {number}{blank}{article}"
        row = {"instruction": INSTRUCTION[language], "input": text[0].upper() + text[1:], "output": answer}
        found.setdefault(answer, row)
    return list(found.values())


def main(folder: Path) -> None:
    rng = random.Random(SEED)
    for part in SIZES:
        both = rows("en", part, rng) + rows("zh", part, rng)
        rng.shuffle(both)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in both]
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
